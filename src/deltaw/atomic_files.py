"""Atomic file writes.

A file is written under a temporary name in the same folder, flushed to disk and renamed. A process that is killed
while it writes leaves the old file or no file, never an incomplete one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deltaw import platforms
from deltaw.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path. If the block succeeds, flush the file and rename it to ``path``.

    Raises:
        UserError: if the folder cannot be created or written to, or if the file name is reserved on Windows or another
            program has the file open there.
    """
    target = Path(path)
    platforms.reject_reserved_names(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        message = f"cannot write '{target.name}': {error.strerror or error}"
        raise UserError(message, location=str(target.parent), hint="choose a folder with write permission") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        apply_umask(temporary, 0o666)
        sync_file(temporary)
        try:
            platforms.rename_path(temporary, target)
        except PermissionError as error:
            if not platforms.WINDOWS:
                raise
            message = f"'{target.name}' cannot be replaced: {error.strerror or error}"
            hint = "close the program that has it open, and run the command again"
            raise UserError(message, location=str(target), hint=hint) from error
        sync_folder(target.parent)
    finally:
        platforms.remove_path(temporary)


def apply_umask(path: Path, mode: int) -> None:
    """Set the mode of a temporary file or folder, which only its owner can read, to ``mode`` minus the umask."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Atomically write ``text`` to ``path`` as UTF-8, without newline translation."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sync_file(path: Path) -> None:
    """Flush a file's content to disk. Windows requires write access for that."""
    with path.open("r+b" if platforms.WINDOWS else "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a rename to disk. Has no effect on Windows, which cannot open folders."""
    if platforms.WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
