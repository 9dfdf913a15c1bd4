"""Atomic file writes.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed. A process that
is killed during the write leaves the old file or no file, never an incomplete one.
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
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; if the block ends without an error, it is flushed and renamed to ``path``.

    Raises:
        UserError: the folder cannot be created or written to, or Windows cannot have the name or keeps the file
            open for another program.
    """
    target = Path(path)
    platforms.refuse_names(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    except OSError as error:
        what = f"cannot write '{target.name}': {error.strerror or error}"
        raise UserError(what, where=str(target.parent), hint="choose a folder that you may write to") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        open_to_all(temporary, 0o666)
        sync_file(temporary)
        try:
            platforms.renamed(temporary, target)
        except PermissionError as error:
            if not platforms.WINDOWS:
                raise
            what = f"'{target.name}' cannot be replaced: {error.strerror or error}"
            hint = "close the program that has it open, and run the command again"
            raise UserError(what, where=str(target), hint=hint) from error
        sync_folder(target.parent)
    finally:
        platforms.removed(temporary)


def open_to_all(made: Path, mode: int) -> None:
    """Give a temporary file or folder, which only its owner can read, the mode that the user's umask leaves."""
    umask = os.umask(0)
    os.umask(umask)
    made.chmod(mode & ~umask)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8 with its own line ends, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk. Windows does that only for who may write."""
    with path.open("r+b" if platforms.WINDOWS else "rb") as written:
        os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, on systems that can open a folder (not on Windows)."""
    if platforms.WINDOWS:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
