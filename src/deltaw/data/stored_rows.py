"""The usable rows of all sources as stored examples: found in the cache, or read in chunks and kept there.

It knows sources, chunks and the cache; not duplicates, splits or weights.
"""

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
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from deltaw.cache import Cache, versions
from deltaw.data.chunk import Account, ChunkReader, LongRows, Systems, frequent, nothing_left, shared_system
from deltaw.data.example import Example
from deltaw.data.formats import Form, choose_form, unused_columns
from deltaw.data.mixture import Source
from deltaw.data.report import BadRows, Progress, Report, Say
from deltaw.data.row_store import FORMAT, DamagedRowsError, DiskRows, MemoryRows, RowStore, schema
from deltaw.data.row_stream import RowStream, sample
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import check_group, choose, group_digest, groups_of, open_source
from deltaw.data.templates import Encoder
from deltaw.durable import replacing, write_text
from deltaw.errors import UserError
from deltaw.machine.processor import usable_processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What stored rows depend on: files, tokenizer, template, settings, and the code that makes rows of them.
#
# It knows how to tell whether one of these changed; not what is stored.


# Settings that change nothing about a row's tokens. All others count, also those to come.
_WITHOUT = ("train", "eval", "duplicates", "cache", "rows", "columns", "form", "classes", "other_classes")
MADE_BY = (
    *("transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "numpy"),
    *("deltaw.data", "deltaw.hub.terminators"),
)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of what a tokenizer does; None for one whose vocabulary is not at hand as text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    digest = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    told = [type(tokenizer).__name__, tokenizer.chat_template, special]
    digest.update(json.dumps(told, sort_keys=True, default=str).encode())
    return digest.hexdigest()


# Where rows' tokens are kept on the disk, and found again by all that they depend on.
#
# An entry is an Arrow file and a description. The description is written last, after the rows are on the disk:
# a process that is killed on the way leaves nothing that is believed. An entry whose file is not what the
# description says is removed and made anew. Entries that were not used for the longest time make room.
#
# It knows files and keys; not how rows are read or split.


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

    Attributes:
        path, skipped: files of the rows, and of the list of rows that were skipped.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, key: str, say: Say) -> None:
        self._cache = Cache("rows", LIMIT_BYTES)
        self.folder = self._cache.folder
        self.path, self.skipped = self.folder / f"{key}{_ROWS}", self.folder / f"{key}{_SKIPPED}"
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

    def find(self, read: Callable[[RowStore, dict[str, Any], Path], T]) -> T | None:
        """What ``read`` makes of the rows, of what was told of them, and of the list of skipped ones; None
        where they are not there, or not whole."""
        about = self.path.with_suffix(_ABOUT)
        try:
            told = json.loads(about.read_text(encoding="utf-8"))
            found = read(self._open(told), dict(told["facts"]), self.skipped)
            self._cache.used(self._key)
        except (OSError, ValueError, KeyError, TypeError, DamagedRowsError) as error:
            if not isinstance(error, FileNotFoundError) or error.filename != str(about):
                self._say(f"the stored tokens in {self.path} are damaged: they are made anew")
                self._cache.remove(self._key)
            return None
        return found

    def _open(self, told: dict[str, Any]) -> RowStore:
        file = self.path.open("rb")
        try:
            if [told["format"], told["bytes"], told["sample"]] != [FORMAT, *_sample(file)]:
                raise DamagedRowsError("not what was written")
            rows = self.rows(file, bool(told["grouped"]))
            if len(rows) != told["rows"]:
                raise DamagedRowsError("another number of rows")
            return rows
        except BaseException:
            file.close()
            raise

    def rows(self, file: IO[bytes], grouped: bool) -> DiskRows:
        """The rows of an entry, whose file is ``file``."""
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
            told = {"about": about, "format": FORMAT, "rows": count, "bytes": size, "sample": digest}
            told |= {"grouped": grouped, "facts": dict(facts)}
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
        hint = "free space there, or choose another cache folder in DELTAW_CACHE"
        raise UserError(f"tokens cannot be kept: {error.strerror or error}", where=str(folder), hint=hint) from error


# Work on many items by several processes, its results in the order of the items.
#
# Processes are forked, so they share what is in memory already and begin at once. They run Python alone: no
# operator of torch, whose threads a forked process does not have. It knows neither rows nor tokens.


# More processes than this are kept waiting by the one that reads and writes.
MOST = 8
# A process whose parent is gone notices after so many seconds.
_ALONE_SECONDS = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def processes() -> int:
    """How many processes may work at once: one where processes cannot be forked safely, or where the variable
    TOKENIZERS_PARALLELISM forbids it."""
    asked = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if sys.platform != "linux" or asked in ("0", "false", "no", "off", "f", "n"):
        return 1
    return max(1, min(MOST, len(usable_processors())))


def in_order(items: Iterable[Item], work: Callable[[Item], Result], count: int) -> Iterator[Result]:
    """``work`` of each item, in order, by ``count`` processes; by this one alone if that is 1.

    Items are taken as they are needed, so that few of them are in memory.

    Raises:
        UserError: a process was ended from outside.
        Exception: work raised it; its cause has the text of the process's traceback.
    """
    if count <= 1:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, fork, initializer=_begin, initargs=(work, os.getpid()))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # other threads: theirs are not used there
                waiting.append(pool.submit(_answer, item))
            if len(waiting) == 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        hint = "if memory ran out, set the environment variable TOKENIZERS_PARALLELISM=false: one process needs less"
        raise UserError("a process that reads rows was ended", hint=hint) from error
    finally:
        pool.shutdown(cancel_futures=True)


# In a process of the pool: the work.
_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """What a process does first."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one thread
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, which may be killed and tell nobody."""
    while os.getppid() == parent:
        time.sleep(_ALONE_SECONDS)
    os._exit(1)


def _answer(item: Any) -> Any:
    return _work(item)


# With ``data.cache: auto``, rows are kept where their files are larger, or where tokenizing took longer.
LARGE_BYTES, LONG_SECONDS = 8 * 2**20, 0.25
# Below this, looking for kept rows takes longer than making them.
TINY_BYTES = 2**18
# Files that are larger are read by several processes.
SEVERAL_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Read:
    """The usable rows of all sources.

    Attributes:
        rows: their examples. report: what became of the others.
        ends: by source, how many rows there are up to its last.
    """

    rows: RowStore
    report: Report
    ends: list[int]

    def source_of(self, places: np.ndarray) -> np.ndarray:
        """(n,) the number of the source that each example comes from."""
        if len(self.ends) == 1:
            return np.zeros(len(places), np.int64)
        return np.searchsorted(self.ends, self.rows.ordinals()[places], side="right")


def read_stored(
    sources: Sequence[Source],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    *,
    seed: int = 0,
    say: Say,
) -> Read:
    """The rows of all sources, tokenized once for all runs that read the same.

    Args:
        settings: the ``data:`` section; its ``train``, ``eval`` and ``duplicates`` do not matter here.
        bad: told of rows that cannot be used.
        seed: of the rows that are chosen, where ``rows`` asks for fewer.
        say: told how far a long reading is.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    reading = _Reading.of(sources, settings, tokenizer, seed, say)
    with contextlib.ExitStack() as opened:
        cache = _cache(reading, tokenizer, opened)
        read = None if cache is None else cache.find(reading.known)
        if read is None:
            read = reading.into(opened.enter_context(RowWriter(cache)))
    bad.extend(reading.bad.lines())
    return read


def _cache(reading: _Reading, tokenizer: PreTrainedTokenizerBase, opened: contextlib.ExitStack) -> RowCache | None:
    """Where these rows are kept; None where they are not to be, or where it cannot be told what they are."""
    settings = reading.settings
    if settings.cache is False or (settings.cache == "auto" and reading.bytes <= TINY_BYTES):
        return None
    facts = reading.facts(tokenizer)
    if facts is None:
        return None
    try:
        return opened.enter_context(RowCache(key_of(facts), reading.say))
    except UserError:
        if settings.cache is True:
            raise
        return None


@dataclass(frozen=True)
class _Reading:
    """Sources that are to be read."""

    sources: Sequence[Source]
    streams: Sequence[RowStream]
    settings: DataSettings
    encoder: Encoder
    bad: BadRows
    seed: int
    say: Say
    name: str

    @classmethod
    def of(
        cls, sources: Sequence[Source], settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int, say: Say
    ) -> _Reading:
        bad = BadRows(settings.bad_rows)
        encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        skip = bad.add if settings.bad_rows == "skip" else None
        streams = [open_source(source.reference, skip, max_bytes=settings.max_row_bytes) for source in sources]
        name = " + ".join(source.reference for source in sources)
        return cls(sources, streams, settings, encoder, bad, seed, say, name)

    @property
    def bytes(self) -> int:
        return sum(stream.bytes for stream in self.streams)

    def facts(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, object] | None:
        """Everything that the rows depend on, as JSON can hold it; None where a source or the tokenizer does not
        say."""
        identity, contents = tokenizer_identity(tokenizer), [stream.identity() for stream in self.streams]
        if identity is None or None in contents:
            return None
        settings, rows = dataclasses.asdict(self.settings), self.settings.rows
        forms = [[self._columns(source), source.form or self.settings.form] for source in self.sources]
        return {
            "format": FORMAT,
            "made by": versions(MADE_BY),
            "sources": [[content, *form] for content, form in zip(contents, forms, strict=True)],
            "settings": {key: value for key, value in settings.items() if key not in _WITHOUT},
            "chosen": None if rows is None else [rows, self.seed],
            "tokenizer": identity,
            "encoder": self.encoder.identity,
        }

    def known(self, rows: RowStore, facts: dict[str, Any], skipped: Path) -> Read:
        """Rows that were kept, with what was counted when they were made, and the list of skipped ones."""
        if facts["report"]["bad_rows"]:
            self.bad.extend(BadRows.read(skipped).lines())
        told = facts["report"] | {"unused_columns": tuple(facts["report"]["unused_columns"])}
        return Read(rows, Report(source=self.name, **told), list(facts["ends"]))

    def into(self, writer: RowWriter) -> Read:
        """Read all usable rows and give them to ``writer``.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        forms = self._scan()
        counts = [stream.rows for stream in self.streams]
        chosen = choose(sum(counts), self.settings.rows, self.seed)
        progress = Progress(self.say, f"tokenizing {self.name}", self.bytes)
        account, long, systems = Account(), LongRows(), Systems()
        count = processes() if self.bytes > SEVERAL_BYTES else 1
        for part in in_order(self._parts(chosen), functools.partial(self._read_part, forms), count):
            writer.add(part.examples, part.ordinals, part.groups)
            account += part.account
            systems = frequent(systems + part.systems)
            long.add(part.long)
            self.bad.extend(part.skipped)
            progress.at(part.end, sum(stream.position for stream in self.streams))
        if long.count:
            raise long.error(self.settings.max_length)
        report = replace(self._report(forms, account, len(chosen), len(writer)), **shared_system(systems))
        told = {k: v for k, v in report.as_dict().items() if k not in ("source", "evaluation")}
        facts = {"report": told, "ends": np.cumsum(counts).tolist()}
        keep = self.settings.cache is True or self.bytes > LARGE_BYTES or progress.seconds > LONG_SECONDS
        about = f"{self.name}: {len(writer):,} examples"
        rows = writer.finish(about, facts, keep=keep, write_skipped=self.bad.write if self.bad else None)
        return Read(rows, report, list(facts["ends"]))

    def _columns(self, source: Source) -> dict[str, str]:
        return self.settings.columns if source.columns is None else source.columns

    def _scan(self) -> list[Form]:
        """Find the format of each source, before anything slow begins."""
        forms = []
        for source, stream in zip(self.sources, self.streams, strict=True):
            stream.scan(Progress(self.say, f"reading {source.reference}", stream.bytes).at)
            check_group(stream.name, stream.columns, self.settings.group)
            forms.append(choose_form(stream, source.form or self.settings.form, self._columns(source)))
        return forms

    def _parts(self, chosen: Sequence[int]) -> Iterator[_Part]:
        """The chosen rows of all sources, in chunks."""
        begin = 0
        for source, stream in enumerate(self.streams):
            for chunk in stream.chunks():
                indices = _inside(chosen, begin, len(chunk))
                if len(indices):
                    yield _Part(source, chunk, indices, begin)
                begin += len(chunk)

    def _read_part(self, forms: Sequence[Form], part: _Part) -> _PartRead:
        """The examples of some rows, each with the number of its row over all sources, and with its group."""
        settings = replace(self.settings, columns=self._columns(self.sources[part.source]))
        bad = BadRows(settings.bad_rows)
        reader = ChunkReader(self.encoder, forms[part.source], settings, bad)
        lists = reader.read(part.chunk, part.indices)
        values = groups_of(part.chunk, part.indices, settings.group)
        examples: list[Example] = []
        ordinals: list[int] = []
        groups: list[bytes] = []
        for index, value, found in zip(part.indices, values, lists, strict=True):
            examples += found
            ordinals += [part.begin + index] * len(found)
            groups += [group_digest(value)] * len(found) if settings.group is not None else []
        end = part.begin + len(part.chunk)
        counted = reader.account, frequent(reader.systems), reader.long
        return _PartRead(examples, ordinals, groups, *counted, list(bad.lines()), end)

    def _report(self, forms: Sequence[Form], account: Account, chosen: int, kept: int) -> Report:
        """What became of the rows.

        Raises:
            UserError: none is left.
        """
        if not kept:
            hint = "raise data.max_length, or check the answers: empty and truncated ones have no label"
            raise nothing_left(self.name, account, self.bad, len(self.bad), hint)
        names = dict.fromkeys(form.name for form in forms)
        templates = dict.fromkeys("plain" if form.name == "text" else self.encoder.template for form in forms)
        unused: dict[str, None] = {}
        for source, stream, form in zip(self.sources, self.streams, forms, strict=True):
            unused.update(dict.fromkeys(unused_columns(stream, form, self._columns(source))))
        unused.pop(str(self.settings.group), None)
        rows, unread = (sum(counts) for counts in zip(*((s.rows, s.bad) for s in self.streams), strict=True))
        return Report(
            source=self.name,
            form=" + ".join(names),
            template=" + ".join(templates),
            rows_read=rows + unread,
            rows_kept=kept,
            not_chosen=rows - chosen,
            unused_columns=tuple(unused),
            date=self.encoder.dated if "chat" in templates else None,
            bad_rows=dict(self.bad.counts),
            **account,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class _Part:
    """Rows to be read: those at ``indices`` of a chunk, whose first row is number ``begin`` of all."""

    source: int
    chunk: Rows
    indices: Sequence[int]
    begin: int


@dataclass(frozen=True)
class _PartRead:
    """What became of the rows of a part, the last of which is before number ``end``."""

    examples: list[Example]
    ordinals: list[int]
    groups: list[bytes]
    account: Account
    systems: Systems
    long: LongRows
    skipped: list[dict[str, object]]
    end: int


def _inside(chosen: Sequence[int], begin: int, count: int) -> Sequence[int]:
    """Which of ``count`` rows from ``begin`` on are chosen, counted from there."""
    if isinstance(chosen, range):
        return range(count)
    first, last = np.searchsorted(chosen, [begin, begin + count])
    return [index - begin for index in chosen[first:last]]
