"""Tokenized rows of all sources, loaded from the cache or created in chunks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from deltaw.atomic_files import atomic_path, write_text
from deltaw.cache.entries import Cache
from deltaw.cache.keys import versions
from deltaw.data.chunk import Account, ChunkReader, LongRows, Systems, frequent, no_rows_error, shared_system
from deltaw.data.example import Example
from deltaw.data.formats import RowFormat, choose_form, unused_columns
from deltaw.data.report import BadRows, LabelNumbers, PreparationReport, ReadProgress
from deltaw.data.row_images import ImagePlacer
from deltaw.data.row_store import FORMAT, DamagedRowsError, DiskRows, MemoryRows, RowStore, schema
from deltaw.data.row_stream import RowStream, sample
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import check_group, choose_rows, group_digest, groups_of, open_source
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.machine.choices import usable_processors
from deltaw.progress import LogFunction
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import MixtureSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Cache keys depend on files, tokenizer, template, settings and code versions.

# Settings that do not affect the tokens of a row. All other settings are part of the cache key.
_IGNORED_SETTINGS = ("train", "eval", "duplicates", "cache", "rows", "columns", "form", "classes", "other_classes")
_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy")
_SETTINGS = tuple(f"deltaw.settings.{name}" for name in ("columns", "data", "mixture", "row_kinds"))
CACHE_DEPENDENCIES = (*_PACKAGES, *_SETTINGS, "deltaw.data", "deltaw.hub.terminators")


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a hash of a tokenizer's behavior, or None if its vocabulary cannot be serialized."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    config = [type(tokenizer).__name__, tokenizer.chat_template, special]
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# Cache of tokenized rows.
#
# An entry is an Arrow file and a description, which is written last, so that a killed process leaves no valid entry. An
# entry whose file does not match its description is removed and created again. Least recently used entries are evicted.

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


# Ordered parallel map.
#
# Worker processes are forked, so that they share memory and start immediately. They must not call operators of torch,
# whose threads do not exist after a fork.

# Maximum number of worker processes. More would wait for the process that reads and writes.
MAX_PROCESSES = 8
# Interval in seconds at which a worker checks that its parent is alive.
_PARENT_CHECK_SECONDS = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_processes() -> int:
    """Return the number of worker processes: 1 if forking is unsafe or disabled by TOKENIZERS_PARALLELISM."""
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if sys.platform != "linux" or parallelism in ("0", "false", "no", "off", "f", "n"):
        return 1
    return max(1, min(MAX_PROCESSES, len(usable_processors())))


def in_order(items: Iterable[Item], work: Callable[[Item], Result], count: int) -> Iterator[Result]:
    """Yield ``work(item)`` for each item in order, computed by ``count`` processes, or by this process if ``count`` is
    1.

    Items are consumed lazily, so that only some are in memory.

    Raises:
        UserError: if a process was killed.
        Exception: raised by ``work``. Its cause contains the traceback of the process.
    """
    if count <= 1:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, fork, initializer=_start_worker, initargs=(work, os.getpid()))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            with warnings.catch_warnings():
                # The warning is about forking with threads, which workers do not use.
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(pool.submit(_run_work, item))
            if len(waiting) == 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        hint = "if memory ran out, set the environment variable TOKENIZERS_PARALLELISM=false: one process needs less"
        raise UserError("a process that reads rows was killed", hint=hint) from error
    finally:
        pool.shutdown(cancel_futures=True)


# The function that a worker process runs.
_work: Callable[[Any], Any]


def _start_worker(work: Callable[[Any], Any], parent: int) -> None:
    """Initialize a worker process."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one thread
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit soon after the parent process, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _run_work(item: Any) -> Any:
    return _work(item)


# With ``data.cache: auto``, rows are stored if their files are larger, or if tokenizing took longer.
LARGE_BYTES = 8 * 2**20
LONG_SECONDS = 0.25
# File size below which a cache lookup takes longer than tokenizing.
TINY_BYTES = 2**18
# File size from which several processes tokenize.
PARALLEL_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ReadResult:
    """Usable rows of all sources.

    Attributes:
        rows: Examples.
        report: Row counts.
        ends: For each source, the cumulative number of rows.
    """

    rows: RowStore
    report: PreparationReport
    ends: list[int]

    def source_of(self, indices: np.ndarray) -> np.ndarray:
        """Return (n,) the source index of each example."""
        if len(self.ends) == 1:
            return np.zeros(len(indices), np.int64)
        return np.searchsorted(self.ends, self.rows.ordinals()[indices], side="right")


def read_stored(
    sources: Sequence[MixtureSource],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    *,
    seed: int = 0,
    log: LogFunction,
    images: ImagePlacer | None = None,
) -> ReadResult:
    """Return the tokenized rows of all sources, from the cache if possible.

    Token ids of images are assigned in the order of the rows. Rows with images are therefore read by this process, and
    not cached.

    Args:
        settings: The ``data:`` section. ``train``, ``eval`` and ``duplicates`` are ignored.
        bad: Collects unusable rows.
        seed: Seed for choosing rows (``data.rows``).
        log: Receives progress lines.
        images: See :class:`deltaw.data.templates.Encoder`.

    Raises:
        UserError: if the data cannot be used. The message names the file and the row.
    """
    encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date, images)
    reader = _SourceReader.open(sources, settings, encoder, seed, log)
    with contextlib.ExitStack() as opened:
        cache = _cache(reader, tokenizer, opened)
        read = None if cache is None else cache.find(reader.from_cache)
        if read is None:
            read = reader.read_into(opened.enter_context(RowWriter(cache)))
    bad.extend(reader.bad.lines())
    return read


def _cache(reader: _SourceReader, tokenizer: PreTrainedTokenizerBase, opened: contextlib.ExitStack) -> RowCache | None:
    """Return the cache entry of these rows, or None if they should not be cached or cannot be identified."""
    settings = reader.settings
    if settings.cache is False or (settings.cache == "auto" and reader.bytes <= TINY_BYTES):
        return None
    if reader.encoder.images is not None:
        return None
    dependencies = reader.dependencies(tokenizer)
    if dependencies is None:
        return None
    try:
        return opened.enter_context(RowCache(cache_key(dependencies), reader.log))
    except UserError:
        if settings.cache is True:
            raise
        return None


@dataclass(frozen=True)
class _SourceReader:
    """Sources to read, with everything needed for reading them."""

    sources: Sequence[MixtureSource]
    streams: Sequence[RowStream]
    settings: DataSettings
    encoder: Encoder
    bad: BadRows
    seed: int
    log: LogFunction
    name: str

    @classmethod
    def open(
        cls, sources: Sequence[MixtureSource], settings: DataSettings, encoder: Encoder, seed: int, log: LogFunction
    ) -> _SourceReader:
        bad = BadRows(settings.bad_rows)
        skip = bad.add if settings.bad_rows == "skip" else None
        streams = [open_source(source.reference, skip, max_bytes=settings.max_row_bytes) for source in sources]
        name = " + ".join(source.reference for source in sources)
        return cls(sources, streams, settings, encoder, bad, seed, log, name)

    @property
    def bytes(self) -> int:
        return sum(stream.bytes for stream in self.streams)

    def dependencies(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, object] | None:
        """Return everything that the rows depend on as JSON values, or None if a source or the tokenizer has no
        identity.
        """
        identity = tokenizer_identity(tokenizer)
        contents = [stream.identity() for stream in self.streams]
        if identity is None or None in contents:
            return None
        settings = dataclasses.asdict(self.settings)
        rows = self.settings.rows
        forms = [[self._columns(source), source.form or self.settings.form] for source in self.sources]
        return {
            "format": FORMAT,
            "made by": versions(CACHE_DEPENDENCIES),
            "sources": [[content, *form] for content, form in zip(contents, forms, strict=True)],
            "settings": {key: value for key, value in settings.items() if key not in _IGNORED_SETTINGS},
            "chosen": None if rows is None else [rows, self.seed],
            "tokenizer": identity,
            "encoder": self.encoder.identity,
        }

    def from_cache(self, rows: RowStore, metadata: dict[str, Any], skipped: Path) -> ReadResult:
        """Build the result from a cache entry.

        Args:
            rows: Stored rows.
            metadata: Metadata stored with the rows.
            skipped: File with the list of skipped rows.
        """
        report = metadata["report"]
        if report["bad_rows"]:
            self.bad.extend(BadRows.read(skipped).lines())
        counts = {
            **report,
            "unused_columns": tuple(report["unused_columns"]),
            "label_numbers": tuple(LabelNumbers(**numbers) for numbers in report["label_numbers"]),
        }
        return ReadResult(rows, PreparationReport(source=self.name, **counts), list(metadata["ends"]))

    def read_into(self, writer: RowWriter) -> ReadResult:
        """Read all usable rows into ``writer``.

        Raises:
            UserError: if a row is unusable, or no usable row exists.
        """
        forms = self._scan()
        counts = [stream.rows for stream in self.streams]
        chosen = choose_rows(sum(counts), self.settings.rows, self.seed)
        progress = ReadProgress(self.log, f"tokenizing {self.name}", self.bytes)
        account = Account()
        long = LongRows()
        systems = Systems()
        count = num_processes() if self.bytes > PARALLEL_BYTES and self.encoder.images is None else 1
        for part in in_order(self._parts(chosen), functools.partial(self._read_part, forms), count):
            writer.add(part.examples, part.ordinals, part.groups)
            account += part.account
            systems = frequent(systems + part.systems)
            long.add(part.long)
            self.bad.extend(part.skipped)
            progress.update(part.end, sum(stream.position for stream in self.streams))
        if long.count:
            raise long.error(self.settings.max_length)
        report = replace(self._report(forms, account, len(chosen), len(writer)), **shared_system(systems))
        counts_by_name = {k: v for k, v in report.as_dict().items() if k not in ("source", "evaluation")}
        metadata = {"report": counts_by_name, "ends": np.cumsum(counts).tolist()}
        store = self.settings.cache is True or self.bytes > LARGE_BYTES or progress.seconds > LONG_SECONDS
        about = f"{self.name}: {len(writer):,} examples"
        rows = writer.finish(about, metadata, store=store, write_skipped=self.bad.write if self.bad else None)
        return ReadResult(rows, report, list(metadata["ends"]))

    def _columns(self, source: MixtureSource) -> dict[str, str]:
        return self.settings.columns if source.columns is None else source.columns

    def _scan(self) -> list[RowFormat]:
        """Return the format of each source, before slow work starts."""
        forms = []
        for source, stream in zip(self.sources, self.streams, strict=True):
            stream.scan(ReadProgress(self.log, f"reading {source.reference}", stream.bytes).update)
            check_group(stream.name, stream.columns, self.settings.group)
            forms.append(choose_form(stream, source.form or self.settings.form, self._columns(source)))
        return forms

    def _parts(self, chosen: Sequence[int]) -> Iterator[_RowRange]:
        """Yield the chosen rows of all sources in chunks."""
        start = 0
        for source, stream in enumerate(self.streams):
            for chunk in stream.chunks():
                indices = _chosen_in_chunk(chosen, start, len(chunk))
                if len(indices):
                    yield source, chunk, indices, start
                start += len(chunk)

    def _read_part(self, forms: Sequence[RowFormat], part: _RowRange) -> _RowRangeResult:
        """Tokenize a range of rows."""
        source, chunk, indices, start = part
        settings = replace(self.settings, columns=self._columns(self.sources[source]))
        bad = BadRows(settings.bad_rows)
        reader = ChunkReader(self.encoder, forms[source], settings, bad)
        values = groups_of(chunk, indices, settings.group)
        examples: list[Example] = []
        ordinals: list[int] = []
        groups: list[bytes] = []
        for index, value, row_examples in zip(indices, values, reader.read(chunk, indices), strict=True):
            examples += row_examples
            ordinals += [start + index] * len(row_examples)
            groups += [group_digest(value)] * len(row_examples) if settings.group is not None else []
        counted = reader.account, frequent(reader.systems), reader.long
        return _RowRangeResult(examples, ordinals, groups, *counted, list(bad.lines()), start + len(chunk))

    def _report(self, forms: Sequence[RowFormat], account: Account, chosen: int, num_kept: int) -> PreparationReport:
        """Return the report of all rows.

        Raises:
            UserError: if no usable row exists.
        """
        if not num_kept:
            hint = "raise data.max_length, or check the answers: empty and truncated ones have no label"
            raise no_rows_error(self.name, account, self.bad, len(self.bad), hint)
        names = dict.fromkeys(form.name for form in forms)
        templates = dict.fromkeys("plain" if form.name == "text" else self.encoder.template for form in forms)
        unused: dict[str, None] = {}
        for source, stream, form in zip(self.sources, self.streams, forms, strict=True):
            with_images = self.encoder.images is not None
            unused.update(dict.fromkeys(unused_columns(stream, form, self._columns(source), images=with_images)))
        unused.pop(str(self.settings.group), None)
        rows, unread = (sum(counts) for counts in zip(*((s.rows, s.bad) for s in self.streams), strict=True))
        return PreparationReport(
            source=self.name,
            form=" + ".join(names),
            template=" + ".join(templates),
            rows_read=rows + unread,
            rows_kept=num_kept,
            not_selected=rows - chosen,
            unused_columns=tuple(unused),
            date=self.encoder.template_date if "chat" in templates else None,
            added_prefix=self.encoder.added_prefix if "chat" in templates else None,
            bad_rows=dict(self.bad.counts),
            **account,  # type: ignore[arg-type]
        )


# Index of a source, rows of a chunk, indices of the rows to read in the chunk, and number of the chunk's first row over
# all sources.
_RowRange: TypeAlias = tuple[int, NumberedRows, Sequence[int], int]


@dataclass(frozen=True)
class _RowRangeResult:
    """Examples and counts of a range of rows.

    Attributes:
        end: Number of rows up to the end of the chunk, over all sources.
    """

    examples: list[Example]
    ordinals: list[int]
    groups: list[bytes]
    account: Account
    systems: Systems
    long: LongRows
    skipped: list[dict[str, object]]
    end: int


def _chosen_in_chunk(chosen: Sequence[int], start: int, count: int) -> Sequence[int]:
    """Return the indices, relative to ``start``, of the chosen rows in ``start`` to ``start + count``."""
    if isinstance(chosen, range):
        return range(count)
    first, last = np.searchsorted(chosen, [start, start + count])
    return [index - start for index in chosen[first:last]]
