"""Disk cache of expensive results, keyed by everything that they depend on.

An entry has a kind and a key. The key is a hash of the inputs, of package versions and of the source of deltaw's
modules (:func:`key`), so that an upgrade or an edit invalidates older entries. Small results are JSON
(:func:`load_result`, :func:`store_result`). Large results are files and folders of a :class:`Cache`, which locks its
entries and evicts the least recently used ones. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from deltaw import platforms
from deltaw.atomic_files import sync_file, write_text
from deltaw.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

# Maximum number of small results per kind. The oldest are removed first.
MAX_ENTRIES = 500
# Digests of files up to this size in bytes are not cached, because a lookup takes as long as hashing.
MIN_CACHED_BYTES = 1 << 22
# Results of files that changed within this many seconds are not cached. File timestamps have a limited resolution, so
# a file could change again without a new timestamp.
MIN_FILE_AGE = 2.0
# Folder of deltaw's modules.
SOURCE = Path(__file__).parent
_COMPILED = (".so", ".pyd", ".dylib", ".dll")

T = TypeVar("T")


def root() -> Path:
    """Return the cache folder: ``$DELTAW_CACHE`` or ``~/.cache/deltaw``."""
    configured = os.environ.get("DELTAW_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "deltaw"


def key(kind: str, parts: object, dependencies: Sequence[str] = ()) -> str:
    """Return the key of an entry.

    Args:
        kind: Kind of the entry.
        parts: JSON-serializable inputs of the entry.
        dependencies: Packages and deltaw modules that produce the entry. ``deltaw.data`` includes its submodules.
    """
    return _hash(_text([kind, parts, versions(dependencies)]))


def versions(dependencies: Sequence[str]) -> dict[str, str]:
    """Return the version of each package, and a hash of the files of each deltaw module."""
    return {name: _state(name) for name in dependencies}


def _state(name: str) -> str:
    if name.partition(".")[0] == "deltaw":
        return _hash_of_module(SOURCE, name)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _hash_of_module(source: Path, name: str) -> str:
    """Return a hash of a module's source, or of all sources and compiled libraries of a package."""
    path = source.joinpath(*name.split(".")[1:])
    files = [path.with_suffix(".py")]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".py", *_COMPILED))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(source).as_posix()}\0{file.stat().st_size}\0".encode())
        _feed(digest.update, file)
    return digest.hexdigest()


# Small results


def load_result(kind: str, parts: object, dependencies: Sequence[str] = ()) -> object | None:
    """Return the stored result for ``parts``, or None if it does not exist or was produced by other versions."""
    key_parts = [parts, versions(dependencies)]
    try:
        entry = json.loads(_file(kind, key_parts).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return entry.get("value") if isinstance(entry, dict) and entry.get("key") == _text(key_parts) else None


def store_result(
    kind: str, parts: object, value: object, dependencies: Sequence[str] = (), max_entries: int = MAX_ENTRIES
) -> None:
    """Store a JSON-serializable result. Only the latest ``max_entries`` results of its kind are retained.

    If the folder is not writable, the result is not stored and the next call computes it again.
    """
    key_parts = [parts, versions(dependencies)]
    file = _file(kind, key_parts)
    try:
        write_text(file, json.dumps({"key": _text(key_parts), "value": value}))
        for oldest in sorted(file.parent.glob("*.json"), key=_changed)[:-max_entries]:
            oldest.unlink(missing_ok=True)
    except (OSError, UserError):
        return


def result_digest(kind: str, parts: object, dependencies: Sequence[str] = ()) -> str | None:
    """Return a hash of the stored result for ``parts``, to detect changes, or None if it does not exist."""
    value = load_result(kind, parts, dependencies)
    return None if value is None else _hash(_text(value))


def _file(kind: str, key_parts: object) -> Path:
    return root() / "remembered" / kind / f"{_hash(_text(key_parts))}.json"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# Input files of entries


def file_state(path: Path) -> list[object]:
    """Return values that change if a file changes: real path, size, inode, modification time and status change time.

    Unlike the modification time, the status change time cannot be set back.
    """
    status = path.stat()
    changed = status.st_ctime_ns if os.name == "posix" else 0
    return [os.path.realpath(path), status.st_size, status.st_ino, status.st_mtime_ns, changed]


def compute_for_files(kind: str, files: Sequence[Path], make: Callable[[], T], dependencies: Sequence[str] = ()) -> T:
    """Return the JSON-serializable result of ``make``, which depends only on the content of ``files``.

    The result is cached until a file changes.

    Raises:
        UserError: if a file changes during the call.
    """
    before = [file_state(file) for file in files]
    cached = load_result(kind, before, dependencies)
    if cached is not None:
        return cached  # type: ignore[return-value]
    start_time = time.time()
    result = make()
    require_unchanged(files, before)
    statuses = (file.stat() for file in files)
    latest = max(status.st_ctime if os.name == "posix" else status.st_mtime for status in statuses)
    if start_time - latest > MIN_FILE_AGE:
        store_result(kind, before, result, dependencies)
    return result


def require_unchanged(files: Sequence[Path], before: Sequence[object]) -> None:
    """Raise a UserError if a file changed since :func:`file_state` was called."""
    for file, state in zip(files, before, strict=True):
        if file_state(file) != state:
            hint = "wait until the file is complete, and try again"
            raise UserError("the file changes while it is read", location=str(file), hint=hint)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. Digests of large files are cached until the file changes.

    Raises:
        OSError: if the file cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        _feed(digest.update, path)
        return digest.hexdigest()

    return compute_for_files("files", [path], read) if path.stat().st_size > MIN_CACHED_BYTES else read()


def _feed(update: Callable[[memoryview], object], path: Path) -> None:
    """Hash a file in chunks, so that memory use does not depend on its size."""
    buffer = memoryview(bytearray(1 << 17))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            update(buffer[:count])


# Large entries


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
        self._limit, self._mark = limit, mark

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
        """Update the last-use time of an entry. Does nothing if the folder is not writable."""
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
        last_use = {name: _changed(self.folder / self._mark.format(name)) for name in names}
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


def _changed(path: Path) -> float:
    """Return the modification time of a file, or 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
