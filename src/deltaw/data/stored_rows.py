"""Tokenized rows of all sources, loaded from the cache or created in chunks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from deltaw.cache.keys import versions
from deltaw.data.bad_rows import BadRows
from deltaw.data.chunk import Account, ChunkReader, LongRows, Systems, frequent, no_rows_error, shared_system
from deltaw.data.example import Example
from deltaw.data.formats import RowFormat, choose_form, unused_columns
from deltaw.data.parallel_map import in_order, num_processes
from deltaw.data.read_progress import ReadProgress
from deltaw.data.report import LabelNumbers, PreparationReport
from deltaw.data.row_cache import RowCache, RowWriter, cache_key
from deltaw.data.row_cache_keys import CACHE_DEPENDENCIES, IGNORED_SETTINGS, tokenizer_identity
from deltaw.data.row_images import ImagePlacer
from deltaw.data.row_selection import check_group, choose_rows, group_digest, groups_of
from deltaw.data.row_store import FORMAT, RowStore
from deltaw.data.row_stream import RowStream
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.progress import LogFunction
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import MixtureSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
            "settings": {key: value for key, value in settings.items() if key not in IGNORED_SETTINGS},
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


_RowRange: TypeAlias = tuple[int, NumberedRows, Sequence[int], int]
"""Index of the source, rows of a chunk, indices of the rows to read, and number of its first row over all sources."""


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
