"""A folder that appears whole or not at all.

It is built beside its place under a hidden name, brought to the disk, and renamed. A process that is killed
meanwhile leaves a hidden folder that no loader takes for a model by mistake; the next one removes it. Whether
its process is gone is told by a lock on the folder, which the system releases however a process ends; on Windows,
which locks no folders, by the number of the process in the name.

It knows folders, not what is in them.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from deltaw import platforms
from deltaw.durable import open_to_all, sync_file, sync_folder
from deltaw.errors import UserError

_PARTIAL, _BEFORE = ".partial-", ".before-"
# Beside the tensors: headers, configuration, tokenizer, and blocks of the file system.
_ROOM = 64 << 20


@contextlib.contextmanager
def appearing(
    target: Path, *, overwrite: bool = False, needed: int = 0, say: Callable[[str], None] = lambda line: None
) -> Iterator[Path]:
    """Yield a hidden folder; if the block ends without an error, it is ``target`` from then on.

    Args:
        target: the folder to appear. It may exist and be empty.
        overwrite: whether an existing folder with files is replaced. It is renamed before the new one takes
            its place, and removed then.
        needed: bytes that will be written.
        say: told of what earlier processes left.

    Raises:
        UserError: there is a folder with files, no room, or no right to write.
    """
    target = Path(os.path.abspath(target))
    check_target(target, overwrite=overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear(target, say)
        check_target(target, overwrite=overwrite)  # a folder that was put back counts
        _check_room(target, needed)
        made = tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}{os.getpid()}-", dir=target.parent)
    except OSError as error:
        raise _not_writable(target, error) from error
    partial = Path(made)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        stack.enter_context(_held(partial))
        yield partial
        try:
            _flush(partial)
            _put(partial, target)
        except OSError as error:
            raise _not_writable(target, error) from error


def check_target(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a place where no folder can appear, before any work is done.

    Raises:
        UserError: a file is there, or a folder with files that is not to be replaced; or Windows cannot have
            the name.
    """
    platforms.refuse_names(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError("the output is not a folder", where=str(target), hint="name a new folder")
    if target.is_dir():
        holds = sorted(entry.name for entry in target.iterdir())
        if holds and not overwrite:
            what = f"the output folder holds files already, such as '{holds[0]}'"
            raise UserError(what, where=str(target), hint="name a new folder, or replace this one with --overwrite")
        if holds and Path.cwd().resolve().is_relative_to(target.resolve()):
            what = "the output folder cannot be replaced while you are in it"
            raise UserError(what, where=str(target), hint="go to another folder first")


def _put(partial: Path, target: Path) -> None:
    """Rename the folder into its place; one that was there is removed after that."""
    before = target.with_name(f".{target.name}{_BEFORE}{os.getpid()}")
    if target.is_dir() and any(target.iterdir()):
        platforms.renamed(target, before)
    open_to_all(partial, 0o777)
    try:
        platforms.renamed(partial, target)  # over an empty folder too
    except OSError:
        if before.is_dir():
            platforms.renamed(before, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def _clear(target: Path, say: Callable[[str], None]) -> None:
    """Remove what dead processes left of this folder; put back what one had moved away."""
    for before in sorted(target.parent.glob(f".{glob.escape(target.name)}{_BEFORE}*")):
        if not _alive(before):
            if not target.exists():
                platforms.renamed(before, target)
                say(f"put back {target.name}, which a process that was stopped had moved away")
            shutil.rmtree(before, ignore_errors=True)
    for left in sorted(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*")):
        if _alive(left) or not _is_free(left):
            say(f"another process is writing {left.name}")
        else:
            shutil.rmtree(left, ignore_errors=True)
            say(f"removed {left.name}, which a process that was stopped left behind")


def _alive(folder: Path) -> bool:
    """Whether the process whose number the name has is there; one of another machine is taken to be."""
    for mark in (_PARTIAL, _BEFORE):
        number = folder.name.rpartition(mark)[2].partition("-")[0]
        if number.isdigit():
            return int(number) != os.getpid() and psutil.pid_exists(int(number))
    return True


def _locked(folder: Path) -> int | None:
    """A handle that holds the folder's lock; None where another process holds it."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """While open, the folder is locked, if the system can lock one; some network file systems cannot."""
    handle = None if platforms.WINDOWS else _locked(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _is_free(folder: Path) -> bool:
    """Whether nobody holds the folder's lock."""
    if platforms.WINDOWS:  # its number alone tells whether the process is there
        return True
    try:
        handle = _locked(folder)
    except OSError:
        return False
    if handle is not None:
        os.close(handle)
    return handle is not None


def _check_room(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed and free < needed + _ROOM:
        what = f"the merged model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free"
        hint = "free some space, choose another disk, or a narrower --precision"
        raise UserError(what, where=str(target.parent), hint=hint)


def _flush(folder: Path) -> None:
    """Bring all files and folders to the disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def _not_writable(target: Path, error: OSError) -> UserError:
    what = f"the folder cannot be written: {error.strerror or error}"
    return UserError(what, where=str(target), hint="name a folder on a disk with room that you may write to")
