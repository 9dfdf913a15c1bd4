"""Where rows' tokens are kept on the disk, and found again by all that they depend on.

An entry is an Arrow file and a description. The description is written last, after the rows are on the disk:
a process that is killed on the way leaves nothing that is believed. An entry whose file is not what the
description says is removed and made anew. Entries that were not used for the longest time make room.

It knows files and keys; not how rows are read or split.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from deltaw.cache import Cache
from deltaw.data.example import Example
from deltaw.data.progress import Say
from deltaw.data.row_store import FORMAT, DamagedRowsError, DiskRows, MemoryRows, RowStore, schema
from deltaw.data.row_stream import sample
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError

# All entries together; the one in use may be larger.
LIMIT_BYTES = 64 * 2**30
# Rows that take more than this in memory go to the disk.
SPILL_BYTES = 96 * 2**20
# Rows of a record batch of the file, at least.
BATCH_ROWS = 4096
# What an example takes in memory beside its tokens and its answer, roughly.
_OBJECTS = 600
_ROWS, _ABOUT, _SKIPPED = ".arrow", ".json", ".skipped.jsonl"

T = TypeVar("T")


def rows_folder() -> Path:
    """``rows`` in deltaw's cache (``$DELTAW_CACHE``, else ``~/.cache/deltaw``)."""
    return Cache("rows", LIMIT_BYTES).folder


def key_of(facts: object) -> str:
    """The name of an entry: a hash of everything that its rows depend on."""
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


class RowCache:
    """One entry, which this process alone works with while it is open.

    Args:
        key: of the entry. say: told when this process waits for another, or finds damage.
        folder: where entries are. limit: bytes that all entries may take.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, key: str, say: Say, *, folder: Path | None = None, limit: int = LIMIT_BYTES) -> None:
        self._cache = Cache("rows", limit, folder=folder)
        self.folder = self._cache.folder
        self._key = key
        self._say = say
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> RowCache:
        def waiting() -> None:
            self._say("another process is preparing the same rows: waiting for it")

        with _writing(self.folder):
            self._opened.callback(self._cache.lock(self._key, waiting).release)
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    @property
    def path(self) -> Path:
        """Of the rows."""
        return self.folder / f"{self._key}{_ROWS}"

    @property
    def skipped(self) -> Path:
        """Of the list of rows that were skipped."""
        return self.folder / f"{self._key}{_SKIPPED}"

    def find(self, read: Callable[[RowStore, dict[str, Any], Path], T]) -> T | None:
        """What ``read`` makes of the rows, of what was told of them, and of the list of skipped ones; None
        where they are not there, or not whole."""
        about = self.path.with_suffix(_ABOUT)
        try:
            told = json.loads(about.read_text(encoding="utf-8"))
            found = read(self._open(told), dict(told["facts"]), self.skipped)
            self._cache.used(self._key)
        except FileNotFoundError as error:
            if error.filename != str(about):
                self._discard()
            return None
        except (OSError, ValueError, KeyError, TypeError, DamagedRowsError):
            self._discard()
            return None
        return found

    def _discard(self) -> None:
        self._say(f"the stored tokens in {self.path} are damaged: they are made anew")
        self._cache.remove(self._key)

    def _open(self, told: dict[str, Any]) -> RowStore:
        file = self.path.open("rb")
        try:
            if [told["format"], told["bytes"], told["sample"]] != [FORMAT, *_sample(file)]:
                raise DamagedRowsError("not what was written")
            rows = self._rows(file, bool(told["grouped"]))
            if len(rows) != told["rows"]:
                raise DamagedRowsError("another number of rows")
            return rows
        except BaseException:
            file.close()
            raise

    def opened(self, grouped: bool) -> DiskRows:
        """The rows of an entry that was just made."""
        return self._rows(self.path.open("rb"), grouped)

    def _rows(self, file: IO[bytes], grouped: bool) -> DiskRows:
        cache, key = self._cache, self._key
        return DiskRows(file, str(self.path), grouped=grouped, on_damage=lambda: cache.remove(key))

    @contextlib.contextmanager
    def making(self) -> Iterator[IO[bytes]]:
        """A file for the rows, which becomes the entry's when the block ends without an error."""
        with _writing(self.folder):
            self._cache.make_room(but=self._key)
            self._cache.remove(self._key)
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                yield file

    def describe(self, count: int, grouped: bool, about: str, facts: Mapping[str, object]) -> None:
        """Write the description: from here on the entry is there."""
        with _writing(self.folder):
            with self.path.open("rb") as file:
                size, digest = _sample(file)
            told = {
                "about": about,
                "format": FORMAT,
                "rows": count,
                "bytes": size,
                "sample": digest,
                "grouped": grouped,
                "facts": dict(facts),
            }
            write_text(self.path.with_suffix(_ABOUT), json.dumps(told, indent=1) + "\n")


class RowWriter:
    """Collects examples: in memory, and once they are many in a file.

    Args:
        cache: where the file is to stay; without one it is gone when the rows are let go.
        spill: bytes in memory from which on examples go to the file.
    """

    def __init__(self, cache: RowCache | None = None, *, spill: int | None = None) -> None:
        self._cache = cache
        self._spill = SPILL_BYTES if spill is None else spill
        self._memory = MemoryRows()
        self._bytes = self._count = 0
        self._grouped = False
        self._file: IO[bytes] | None = None
        self._writer: Any = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def add(self, examples: Sequence[Example], ordinals: Sequence[int], groups: Sequence[bytes]) -> None:
        """Add examples, each with the number of its row over all sources, and with its group if rows have."""
        self._memory.add(examples, ordinals, groups)
        self._count += len(examples)
        self._grouped = self._grouped or bool(groups)
        self._bytes += sum(5 * len(e) + len(e.answer or "") + _OBJECTS for e in examples)
        if self._bytes > self._spill and (self._writer is None or len(self._memory) >= BATCH_ROWS):
            self._write()

    def __len__(self) -> int:
        return self._count

    def finish(
        self,
        about: str,
        facts: Mapping[str, object],
        *,
        keep: bool,
        write_skipped: Callable[[Path], object] | None = None,
    ) -> RowStore:
        """All examples, to be called once.

        Args:
            about: a line for a person who reads the cache's folder. facts: kept with the rows.
            keep: whether few rows, which are in memory, are to be kept in the cache too.
            write_skipped: writes the list of rows that were skipped, if there are any.
        """
        memory, in_memory = self._memory, self._writer is None
        if in_memory and (self._cache is None or not keep):
            return memory
        try:
            self._write()
            with _writing(rows_folder()):
                self._writer.close()
            assert self._file is not None
            if self._cache is None:
                self._file.flush()
                return DiskRows(self._file, "a temporary file", grouped=self._grouped)
            self._open.close()
            if write_skipped is not None:
                write_skipped(self._cache.skipped)
            self._cache.describe(self._count, self._grouped, about, facts)
        except UserError:
            if not in_memory:
                raise
        return memory if in_memory else self._cache.opened(self._grouped)  # type: ignore[union-attr]

    def _write(self) -> None:
        import pyarrow
        import pyarrow.ipc

        with _writing(rows_folder() if self._cache is None else self._cache.folder):
            if self._writer is None:
                if self._cache is None:
                    self._file = _temporary()
                else:
                    self._file = self._open.enter_context(self._cache.making())
                self._writer = pyarrow.ipc.new_file(pyarrow.PythonFile(self._file, mode="w"), schema())
            if len(self._memory):
                self._writer.write_batch(self._memory.batch())
                self._memory = MemoryRows()


def _sample(file: IO[bytes]) -> tuple[int, str]:
    """Size, and a hash of parts spread over the file."""
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.blake2b(digest_size=16)
    sample(file, size, digest)
    return size, digest.hexdigest()


def _temporary() -> IO[bytes]:
    """A file without a name: it is gone when the process ends, however it ends."""
    folder = rows_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=folder)
    except OSError:
        return tempfile.TemporaryFile()


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the rows' tokens cannot be kept: {error.strerror or error}",
            where=str(folder),
            hint="free space there, or choose another cache folder in DELTAW_CACHE",
        ) from error
