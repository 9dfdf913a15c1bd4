"""Cache of tokenized rows on disk.

An entry is an Arrow file and a description, which is written last, so that a killed process leaves no valid entry. An
entry whose file does not match its description is removed and created again. Least recently used entries are evicted.
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

from deltaw.atomic_files import atomic_path, write_text
from deltaw.cache.entries import Cache
from deltaw.data.example import Example
from deltaw.data.row_store import FORMAT, DamagedRowsError, DiskRows, MemoryRows, RowStore, schema
from deltaw.data.row_stream import sample
from deltaw.errors import UserError
from deltaw.progress import LogFunction

# Maximum size of all entries. The entry in use may be larger.
LIMIT_BYTES = 64 * 2**30
# Rows that need more memory than this are written to disk.
SPILL_BYTES = 96 * 2**20
# Minimum number of rows per record batch of the file.
BATCH_ROWS = 4096
# Approximate memory overhead of an example in bytes.
_OBJECTS = 600
_ROWS = ".arrow"
_ABOUT = ".json"
_SKIPPED = ".skipped.jsonl"

T = TypeVar("T")


def rows_folder() -> Path:
    """Return the folder ``rows`` in deltaw's cache (``$DELTAW_CACHE``, else ``~/.cache/deltaw``)."""
    return Cache("rows", LIMIT_BYTES).folder


def cache_key(dependencies: object) -> str:
    """Return the name of an entry: a hash of everything that its rows depend on."""
    return hashlib.blake2b(json.dumps(dependencies, sort_keys=True).encode(), digest_size=16).hexdigest()


class RowCache:
    """One cache entry, locked by this process while it is open.

    Args:
        key: Key of the entry.
        log: Receives a line if this process waits for another one, or finds damage.

    Attributes:
        path: File of the rows.
        skipped: File with the list of skipped rows.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, key: str, log: LogFunction) -> None:
        self._cache = Cache("rows", LIMIT_BYTES)
        self.folder = self._cache.folder
        self.path = self.folder / f"{key}{_ROWS}"
        self.skipped = self.folder / f"{key}{_SKIPPED}"
        self._key = key
        self._log = log
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> RowCache:
        def waiting() -> None:
            self._log("waiting for another process that is preparing the same rows")

        with _writing(self.folder):
            self._opened.callback(self._cache.lock(self._key, waiting).release)
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def find(self, read: Callable[[RowStore, dict[str, Any], Path], T]) -> T | None:
        """Load the entry.

        Args:
            read: Receives the rows, the stored metadata and the path of the list of skipped rows.

        Returns:
            The result of ``read``, or None if the entry does not exist or is damaged.
        """
        description_path = self.path.with_suffix(_ABOUT)
        try:
            description = json.loads(description_path.read_text(encoding="utf-8"))
            result = read(self._open(description), dict(description["facts"]), self.skipped)
            self._cache.touch(self._key)
        except (OSError, ValueError, KeyError, TypeError, DamagedRowsError) as error:
            if not isinstance(error, FileNotFoundError) or error.filename != str(description_path):
                self._log(f"the stored tokens in {self.path} are damaged and will be created again")
                self._cache.remove(self._key)
            return None
        return result

    def _open(self, description: dict[str, Any]) -> RowStore:
        file = self.path.open("rb")
        try:
            if [description["format"], description["bytes"], description["sample"]] != [FORMAT, *_sample(file)]:
                raise DamagedRowsError("unexpected content")
            rows = self.rows(file, bool(description["grouped"]))
            if len(rows) != description["rows"]:
                raise DamagedRowsError("unexpected number of rows")
            return rows
        except BaseException:
            file.close()
            raise

    def rows(self, file: IO[bytes], grouped: bool) -> DiskRows:
        """Return the rows of the entry, reading from ``file``."""
        cache = self._cache
        key = self._key
        return DiskRows(file, str(self.path), grouped=grouped, on_damage=lambda: cache.remove(key))

    @contextlib.contextmanager
    def create(self) -> Iterator[IO[bytes]]:
        """Open a file for the rows. It becomes the file of the entry if the block exits without an error."""
        with _writing(self.folder):
            self._cache.evict(exclude=self._key)
            self._cache.remove(self._key)
            with atomic_path(self.path) as temporary, temporary.open("wb") as file:
                yield file

    def describe(self, count: int, grouped: bool, about: str, metadata: Mapping[str, object]) -> None:
        """Write the description, which makes the entry valid."""
        with _writing(self.folder):
            with self.path.open("rb") as file:
                size, digest = _sample(file)
            description = {"about": about, "format": FORMAT, "rows": count, "bytes": size, "sample": digest}
            description |= {"grouped": grouped, "facts": dict(metadata)}
            write_text(self.path.with_suffix(_ABOUT), json.dumps(description, indent=1) + "\n")


class RowWriter:
    """Collects examples in memory, and in a file if they exceed a size.

    Args:
        cache: Cache entry of the file. Without it, the file is temporary.
        spill: Number of bytes in memory from which examples are written to the file.
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
        """Add examples.

        Args:
            examples: Tokenized examples.
            ordinals: Number of each example's row over all sources.
            groups: Group of each example, or empty without groups.
        """
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
        metadata: Mapping[str, object],
        *,
        store: bool,
        write_skipped: Callable[[Path], object] | None = None,
    ) -> RowStore:
        """Return all examples. Call this once.

        Args:
            about: One-line description for users who inspect the cache folder.
            metadata: Stored with the rows.
            store: Store the rows in the cache even if they fit into memory.
            write_skipped: Writes the list of skipped rows, if any.
        """
        memory = self._memory
        in_memory = self._writer is None
        if in_memory and (self._cache is None or not store):
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
            self._cache.describe(self._count, self._grouped, about, metadata)
        except UserError:
            if not in_memory:
                raise
        if in_memory or self._cache is None:
            return memory
        return self._cache.rows(self._cache.path.open("rb"), self._grouped)

    def _write(self) -> None:
        import pyarrow
        import pyarrow.ipc

        with _writing(rows_folder() if self._cache is None else self._cache.folder):
            if self._writer is None:
                if self._cache is None:
                    self._file = _temporary()
                else:
                    self._file = self._open.enter_context(self._cache.create())
                self._writer = pyarrow.ipc.new_file(pyarrow.PythonFile(self._file, mode="w"), schema())
            if len(self._memory):
                self._writer.write_batch(self._memory.batch())
                self._memory = MemoryRows()


def _sample(file: IO[bytes]) -> tuple[int, str]:
    """Return the file size and a hash of parts spread over the file."""
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.blake2b(digest_size=16)
    sample(file, size, digest)
    return size, digest.hexdigest()


def _temporary() -> IO[bytes]:
    """Return an unnamed file that is removed when the process exits, even if it is killed."""
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
        hint = "free space there, or choose another cache folder in DELTAW_CACHE"
        raise UserError(f"cannot store tokens: {error.strerror or error}", location=str(folder), hint=hint) from error
