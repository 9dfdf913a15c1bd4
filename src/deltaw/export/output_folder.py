"""Output folders that appear atomically, when all of their files are written."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from deltaw import platforms
from deltaw.atomic_files import apply_umask, sync_file, sync_folder
from deltaw.errors import UserError

_PARTIAL = ".partial-"
_BEFORE = ".before-"
# Bytes for headers, configuration, tokenizer and file system overhead.
_DISK_RESERVE = 64 << 20


@contextlib.contextmanager
def atomic_folder(
    target: Path, *, overwrite: bool = False, needed: int = 0, log: Callable[[str], None] = lambda line: None
) -> Iterator[Path]:
    """Yield a hidden folder. If the block succeeds, rename it to ``target``.

    Args:
        target: Destination. It may exist if it is empty.
        overwrite: Replace an existing folder with files. It is renamed first, and removed after the replacement.
        needed: Number of bytes that will be written.
        log: Receives messages about leftovers of earlier processes.

    Raises:
        UserError: if ``target`` contains files, the disk is full, or the folder is not writable.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, log)
        check_target(target, overwrite=overwrite)  # the cleanup may have restored a folder
        if needed and (free := shutil.disk_usage(target.parent).free) < needed + _DISK_RESERVE:
            message = f"the merged model needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free"
            hint = "free some space, or choose another disk or a narrower --precision"
            raise UserError(message, location=str(target.parent), hint=hint)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise _not_writable(target, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        # Locked if the file system supports it.
        if not platforms.WINDOWS and (handle := _acquire_lock(partial)) is not None:
            stack.callback(os.close, handle)
        yield partial
        try:
            _flush(partial)
            _move_into_place(partial, target)
        except OSError as error:
            raise _not_writable(target, error) from error


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Check that a folder can be created at ``target``.

    Raises:
        UserError: if ``target`` is a file, or a folder with files that must not be replaced, or if its name is reserved
            on Windows.
    """
    platforms.reject_reserved_names(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError("the output is not a folder", location=str(target), hint="choose a new folder")
    if target.is_dir():
        entries = sorted(entry.name for entry in target.iterdir())
        if entries and not overwrite:
            message = f"the output folder already contains files, such as '{entries[0]}'"
            raise UserError(message, location=str(target), hint="choose another folder, or add --overwrite")
        if entries and Path.cwd().resolve().is_relative_to(target.resolve()):
            message = "the output folder cannot be replaced because it contains the current directory"
            raise UserError(message, location=str(target), hint="change to another directory first")


def _move_into_place(partial: Path, target: Path) -> None:
    """Rename the folder to its destination, then remove the folder that it replaces."""
    before = target.with_name(f".{target.name}{_BEFORE}{os.getpid()}")
    if target.is_dir() and any(target.iterdir()):
        platforms.rename_path(target, before)
    apply_umask(partial, 0o777)
    try:
        platforms.rename_path(partial, target)  # also replaces an empty folder
    except OSError:
        if before.is_dir():
            platforms.rename_path(before, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def _clear(target: Path, log: Callable[[str], None]) -> None:
    """Remove leftovers of dead processes, and restore a folder that one of them had renamed."""
    for before in sorted(target.parent.glob(f".{glob.escape(target.name)}{_BEFORE}*")):
        if not _is_process_alive(before):
            if not target.exists():
                platforms.rename_path(before, target)
                log(f"restored {target.name}, which an interrupted process had renamed")
            shutil.rmtree(before, ignore_errors=True)
    for leftover in sorted(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*")):
        if _is_process_alive(leftover) or not _is_free(leftover):
            log(f"another process is writing {leftover.name}")
        else:
            shutil.rmtree(leftover, ignore_errors=True)
            log(f"removed {leftover.name}, left by an interrupted process")


def _is_process_alive(folder: Path) -> bool:
    """Return True if the process with the id in the name exists. Other machines' processes are assumed to be alive."""
    match = re.fullmatch(r".*\.(?:partial|before)-([0-9]+)(?:-.*)?", folder.name, re.DOTALL)
    return match is None or (int(match[1]) != os.getpid() and psutil.pid_exists(int(match[1])))


def _acquire_lock(folder: Path) -> int | None:
    """Lock a folder and return its file descriptor, or None if another process owns the lock."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _is_free(folder: Path) -> bool:
    """Return True if no process has locked the folder."""
    if platforms.WINDOWS:  # the process id is checked instead
        return True
    try:
        handle = _acquire_lock(folder)
    except OSError:
        return False
    if handle is not None:
        os.close(handle)
    return handle is not None


def _flush(folder: Path) -> None:
    """Flush all files and folders to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _not_writable(target: Path, error: OSError) -> UserError:
    message = f"the folder cannot be written: {error.strerror or error}"
    return UserError(message, location=str(target), hint="choose a folder with write permission and enough free space")
