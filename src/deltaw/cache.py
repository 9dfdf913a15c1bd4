"""The one cache on the disk: results that took time are found again by everything that they depend on.

An entry has a kind and a key. The key is a hash of what the entry was made from and of what made it: the
versions of packages and the text of deltaw's own modules (:func:`key`). After an upgrade or an edit of the
code, older entries are no longer found. Small results are JSON (:func:`recall`, :func:`remember`); large ones
are files and folders of a :class:`Cache`, which locks its entries and removes the least recently used.

Knows files, locks and versions; not what is stored. Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from deltaw import platforms
from deltaw.durable import write_text
from deltaw.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

# At most this many small results of one kind; the oldest are removed first.
KEPT = 500
# Files up to this many bytes are hashed each time: looking up what was remembered would take as long.
SMALL = 1 << 22
# A result of a file is not remembered if the file changed within this many seconds: file systems count time in
# steps, so it could change again with the same time of change.
SETTLED = 2.0
# Where deltaw's own modules are.
SOURCE = Path(__file__).parent
_COMPILED = (".so", ".pyd", ".dylib", ".dll")

T = TypeVar("T")


def root() -> Path:
    """The folder of all entries: ``$DELTAW_CACHE``, otherwise ``~/.cache/deltaw``."""
    chosen = os.environ.get("DELTAW_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "deltaw"


def key(kind: str, parts: object, made_by: Sequence[str] = ()) -> str:
    """The name of an entry.

    Args:
        parts: what the entry is made from, as JSON can hold it.
        made_by: what makes it: names of packages, and of deltaw's modules (``deltaw.data``, with all below).
    """
    return _hash(_text([kind, parts, versions(made_by)]))


def versions(made_by: Sequence[str]) -> dict[str, str]:
    """The state of each maker of an entry: a package's version, the hash of a deltaw module's files."""
    return {name: _state(name) for name in made_by}


def _state(name: str) -> str:
    if name.partition(".")[0] == "deltaw":
        return _hash_of_module(SOURCE, name)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def _hash_of_module(source: Path, name: str) -> str:
    """Of the text of a module, or of all modules and compiled libraries of a package."""
    place = source.joinpath(*name.split(".")[1:])
    files = [place.with_suffix(".py")]
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix in (".py", *_COMPILED))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(source).as_posix()}\0{file.stat().st_size}\0".encode())
        _feed(digest.update, file)
    return digest.hexdigest()


# Small results


def recall(kind: str, parts: object, made_by: Sequence[str] = ()) -> object | None:
    """What was remembered for ``parts``; None if nothing was, or if something else made it."""
    asked = [parts, versions(made_by)]
    try:
        kept = json.loads(_file(kind, asked).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept.get("value") if isinstance(kept, dict) and kept.get("key") == _text(asked) else None


def remember(kind: str, parts: object, value: object, made_by: Sequence[str] = (), most: int = KEPT) -> None:
    """Store ``value``, which JSON can hold, beside ``most - 1`` others of its kind. If the folder cannot be written
    to, nothing is stored, and the value is computed again the next time."""
    asked = [parts, versions(made_by)]
    file = _file(kind, asked)
    try:
        write_text(file, json.dumps({"key": _text(asked), "value": value}))
        for old in sorted(file.parent.glob("*.json"), key=_changed)[:-most]:
            old.unlink(missing_ok=True)
    except (OSError, UserError):
        return


def stamp(kind: str, parts: object, made_by: Sequence[str] = ()) -> str | None:
    """A hash of what is remembered for ``parts``, which shows whether it changed; None if nothing is."""
    value = recall(kind, parts, made_by)
    return None if value is None else _hash(_text(value))


def _file(kind: str, asked: object) -> Path:
    return root() / "remembered" / kind / f"{_hash(_text(asked))}.json"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# Files that entries are made from


def file_state(path: Path) -> list[object]:
    """What changes whenever a file does: its real path, size, inode, and the times of change of its content and
    its status. Unlike that of the content, the time of the status cannot be set back."""
    status = path.stat()
    changed = status.st_ctime_ns if os.name == "posix" else 0
    return [os.path.realpath(path), status.st_size, status.st_ino, status.st_mtime_ns, changed]


def of_files(kind: str, files: Sequence[Path], make: Callable[[], T], made_by: Sequence[str] = ()) -> T:
    """What ``make`` returns, which follows from the content of ``files`` and which JSON can hold; remembered
    until one of them changes.

    Raises:
        UserError: one changes during the call.
    """
    before = [file_state(file) for file in files]
    known = recall(kind, before, made_by)
    if known is not None:
        return known  # type: ignore[return-value]
    began = time.time()
    made = make()
    require_unchanged(files, before)
    changed = (file.stat() for file in files)
    latest = max(status.st_ctime if os.name == "posix" else status.st_mtime for status in changed)
    if began - latest > SETTLED:
        remember(kind, before, made, made_by)
    return made


def require_unchanged(files: Sequence[Path], before: Sequence[object]) -> None:
    """Raise a UserError if a file has changed since its state was taken."""
    for file, state in zip(files, before, strict=True):
        if file_state(file) != state:
            hint = "wait until it is written, and try again"
            raise UserError("the file changes while it is read", where=str(file), hint=hint)


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content in hexadecimal; that of a large file is remembered until it changes.

    Raises:
        OSError: it cannot be read.
    """

    def read() -> str:
        digest = hashlib.sha256()
        _feed(digest.update, path)
        return digest.hexdigest()

    return of_files("files", [path], read) if path.stat().st_size > SMALL else read()


def _feed(update: Callable[[memoryview], object], path: Path) -> None:
    """Hash a file a piece at a time, so that the process does not grow by it."""
    buffer = memoryview(bytearray(1 << 17))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            update(buffer[:count])


# Large entries


class Cache:
    """Entries of one kind: the files and folders ``KEY`` and ``KEY.suffix`` in one folder.

    Args:
        kind: names the folder below :func:`root`.
        limit: bytes that all entries together may take.
        mark: the path of an entry that is written last and touched with every use; ``{}`` stands for its key.
        folder: instead of the one that ``kind`` names.
    """

    def __init__(self, kind: str, limit: int, *, mark: str = "{}.json", folder: Path | None = None) -> None:
        self.folder = folder or root() / kind
        self._limit, self._mark = limit, mark

    def lock(self, name: str, waiting: Callable[[], object] = lambda: None) -> FileLock:
        """The lock of an entry, acquired; only its owner works with the entry. Creates the folder.

        Args:
            waiting: called if another process has the lock, before this one waits for it.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.try_lock(name)
        if lock is None:
            waiting()
            lock = _lock(self.folder, name)
            lock.acquire()
        return lock

    def try_lock(self, name: str) -> FileLock | None:
        """The lock of an entry, acquired; None if another process has it.

        Raises:
            OSError: the folder does not exist or cannot be written to.
        """
        from filelock import Timeout

        lock = _lock(self.folder, name)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def used(self, name: str) -> None:
        """Note that an entry is used now, unless the folder cannot be written to."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / self._mark.format(name))

    def remove(self, name: str) -> None:
        """Remove an entry, its mark first, so that a part of it is never mistaken for an entry."""
        mark = self.folder / self._mark.format(name)
        if mark.is_dir():
            gone = self.folder / f".{name}.{os.getpid()}.part"
            try:
                platforms.renamed(mark, gone)
            except PermissionError:
                if not platforms.WINDOWS:
                    raise
                return  # a process reads it
            shutil.rmtree(gone)
        for path in [mark, *self._paths(name)]:
            with contextlib.suppress(PermissionError):  # Windows keeps files that a process reads
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def make_room(self, needed: int = 0, *, but: str = "", spare: int | None = None) -> int:
        """Remove what killed processes left, and the least recently used entries that no process works with,
        until ``needed`` bytes fit; returns the bytes of the remaining entries.

        Args:
            but: an entry that this process has locked; it stays.
            spare: bytes to leave free on the disk.
        """
        for part in self.folder.glob(".*.part"):
            with self._free(part.name[1:].partition(".")[0], but) as free:
                if free:
                    shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        names = {path.name.partition(".")[0] for path in self.folder.iterdir() if path.suffix != ".lock"} - {""}
        last_use = {name: _changed(self.folder / self._mark.format(name)) for name in names}
        entries = sorted((last_use[name], name, _bytes(self._paths(name))) for name in names)
        total = sum(size for _, _, size in entries)
        for _, name, size in entries:
            if total + needed <= self._limit and (spare is None or self.free_bytes() >= needed + spare):
                break
            with self._free(name, but) as free:
                if free and name != but:
                    self.remove(name)
                    total -= size
        return total

    def free_bytes(self) -> int:
        """Free space on the disk."""
        return shutil.disk_usage(self.folder).free

    @contextlib.contextmanager
    def _free(self, name: str, own: str) -> Iterator[bool]:
        """Whether no other process works with an entry; none can start within the block."""
        if name == own:
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
        found = [self.folder / name, *self.folder.glob(f"{name}.*")]
        return [path for path in found if path.suffix != ".lock" and path.exists()]


def _lock(folder: Path, name: str) -> FileLock:
    from filelock import FileLock  # takes as long to import as everything else here

    return FileLock(folder / f"{name}.lock")


def _bytes(paths: Sequence[Path]) -> int:
    """The size of files, and of all files in folders; one that disappears does not count."""
    total = 0
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else [path]:
            with contextlib.suppress(OSError):
                total += file.stat().st_size
    return total


def _changed(path: Path) -> float:
    """When a file was last written; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
