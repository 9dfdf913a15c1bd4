"""Large cache entries: files and folders that are locked while they are used, and evicted by their last use."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deltaw import platforms
from deltaw.atomic_files import sync_file
from deltaw.cache.keys import last_change, root
from deltaw.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock


class Cache:
    """Cache entries of one kind, stored as the files and folders ``KEY`` and ``KEY.suffix`` in one folder.

    Args:
        kind: Name of the folder below :func:`root`.
        limit: Maximum total size of all entries in bytes.
        mark: Path of the part of an entry that is written last and touched on every use. ``{}`` is replaced by the key.
        folder: Folder to use instead of the one of ``kind``.
    """

    def __init__(self, kind: str, limit: int, *, mark: str = "{}.json", folder: Path | None = None) -> None:
        self.folder = folder or root() / kind
        self._limit = limit
        self._mark = mark

    def lock(self, name: str, on_wait: Callable[[], object] = lambda: None) -> FileLock:
        """Acquire and return the lock of an entry. Creates the folder.

        Args:
            name: Key of the entry.
            on_wait: Called before waiting if another process owns the lock.

        Raises:
            OSError: if the folder is not writable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.try_lock(name)
        if lock is None:
            on_wait()
            lock = _lock(self.folder, name)
            lock.acquire()
        return lock

    def try_lock(self, name: str) -> FileLock | None:
        """Acquire and return the lock of an entry, or return None if another process owns it.

        Raises:
            OSError: if the folder does not exist or is not writable.
        """
        from filelock import Timeout

        lock = _lock(self.folder, name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def create_folder(
        self, name: str, make: Callable[[Path], object], is_complete: Callable[[Path], bool] = Path.is_dir
    ) -> Path:
        """Return the folder of an entry. If it is missing or incomplete, create it atomically.

        Concurrent processes wait for the first one.

        Args:
            name: Key of the entry.
            make: Writes the files into an empty folder.
            is_complete: Returns True if a folder exists and can be used.

        Raises:
            UserError: if the folder cannot be stored.
        """
        target = self.folder / name
        if is_complete(target):
            self.touch(name)
            return target
        try:
            lock = self.lock(name)
            try:
                if not is_complete(target):
                    self.remove(name)
                    self.evict(exclude=name)
                    self._create_folder(target, make)
            finally:
                lock.release()
        except OSError as error:
            message = f"cannot store the converted model: {error.strerror or error}"
            hint = "free some disk space, or set DELTAW_CACHE to another folder"
            raise UserError(message, location=str(self.folder), hint=hint) from error
        self.touch(name)
        return target

    def _create_folder(self, target: Path, make: Callable[[Path], object]) -> None:
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=self.folder))
        try:
            make(partial)
            for file in partial.iterdir():
                file.chmod(0o644)
                sync_file(file)
            partial.chmod(0o755)
            platforms.rename_path(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def touch(self, name: str) -> None:
        """Update the last-use time of an entry. Has no effect if the folder is not writable."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / self._mark.format(name))

    def remove(self, name: str) -> None:
        """Remove an entry. Its mark is removed first, so that an incomplete entry is never used."""
        mark = self.folder / self._mark.format(name)
        if mark.is_dir():
            trash = self.folder / f".{name}.{os.getpid()}.part"
            try:
                platforms.rename_path(mark, trash)
            except PermissionError:
                if not platforms.WINDOWS:
                    raise
                return  # in use by another process
            shutil.rmtree(trash)
        for path in [mark, *self._paths(name)]:
            with contextlib.suppress(PermissionError):  # Windows does not remove open files
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def evict(self, needed: int = 0, *, exclude: str = "", min_free_bytes: int | None = None) -> int:
        """Remove leftovers of killed processes, and the least recently used unlocked entries until ``needed`` bytes
        fit.

        Args:
            needed: Size of the new entry in bytes.
            exclude: Entry that the caller has locked. It is not removed.
            min_free_bytes: Number of bytes to leave free on the disk.

        Returns:
            Total size of the remaining entries in bytes.
        """
        for part in self.folder.glob(".*.part"):
            with self._free(part.name[1:].partition(".")[0], exclude) as unlocked:
                if unlocked:
                    shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        names = {path.name.partition(".")[0] for path in self.folder.iterdir() if path.suffix != ".lock"} - {""}
        last_use = {name: last_change(self.folder / self._mark.format(name)) for name in names}
        entries = sorted((last_use[name], name, _bytes(self._paths(name))) for name in names)
        total = sum(size for _, _, size in entries)
        for _, name, size in entries:
            if total + needed <= self._limit and (
                min_free_bytes is None or self.free_bytes() >= needed + min_free_bytes
            ):
                break
            with self._free(name, exclude) as unlocked:
                if unlocked and name != exclude:
                    self.remove(name)
                    total -= size
        return total

    def free_bytes(self) -> int:
        """Return the free disk space in bytes."""
        return shutil.disk_usage(self.folder).free

    @contextlib.contextmanager
    def _free(self, name: str, exclude: str) -> Iterator[bool]:
        """Try to lock an entry during the block, and yield True if no other process uses it."""
        if name == exclude:
            yield True
            return
        try:
            lock = self.try_lock(name)
        except OSError:
            lock = None
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _paths(self, name: str) -> list[Path]:
        candidates = [self.folder / name, *self.folder.glob(f"{name}.*")]
        return [path for path in candidates if path.suffix != ".lock" and path.exists()]


def _lock(folder: Path, name: str) -> FileLock:
    from filelock import FileLock  # imported lazily because it takes as long as the rest of this module

    return FileLock(folder / f"{name}.lock")


def _bytes(paths: Sequence[Path]) -> int:
    """Return the total size of files and folders in bytes, ignoring files that disappear meanwhile."""
    total = 0
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            with contextlib.suppress(OSError):
                total += file.stat().st_size
    return total
