"""Reader of text rows: rendering, tokenizing, limiting the length and caching.

Rows are processed in chunks. The report counts every row that is skipped, truncated or dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from deltaw.cache.keys import versions
from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.check import long_text_findings, text_findings, text_length_findings, text_summary_findings
from deltaw.data.data_findings import DataFinding
from deltaw.data.data_statistics import DataStatistics, collect_statistics
from deltaw.data.example import Example, token_spans
from deltaw.data.formats import Record, RowFormat, choose_form, read_records, system_of, unused_columns, with_system
from deltaw.data.long_rows import LongRows, limit_length, split_long, would_split_image
from deltaw.data.parallel_map import in_order, num_processes
from deltaw.data.read_progress import ReadProgress
from deltaw.data.report import (
    Account,
    LabelNumbers,
    PreparationReport,
    Systems,
    count_of,
    count_system,
    frequent,
    no_rows_error,
    shared_system,
)
from deltaw.data.row_cache import RowCache, RowWriter, cache_key
from deltaw.data.row_cache_keys import CACHE_DEPENDENCIES, IGNORED_SETTINGS, tokenizer_identity
from deltaw.data.row_images import ImagePlacer
from deltaw.data.row_reader import UNLIMITED, ExamplePreview, Reader, RowPreview
from deltaw.data.row_selection import ReadResult, check_group, choose_rows, group_digest, groups_of
from deltaw.data.row_store import FORMAT, RowStore, RowView
from deltaw.data.row_stream import RowStream
from deltaw.data.rows import NumberedRows
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError
from deltaw.hub.terminators import terminators_in
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import MixtureSource, Train, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# With ``data.cache: auto``, rows are stored if their files are larger, or if tokenizing took longer.
LARGE_BYTES = 8 * 2**20
LONG_SECONDS = 0.25
# File size below which a cache lookup takes longer than tokenizing.
TINY_BYTES = 2**18
# File size from which several processes tokenize.
PARALLEL_BYTES = 16 * 2**20


class TextReader(Reader):
    """Reader for causal language models. Rows are processed in chunks and stored compactly, so that memory is constant
    except for small arrays.

    Args:
        folder: Model folder, which defines the tokens that end a text.
        images: See :class:`deltaw.data.templates.Encoder`.
    """

    tokenizer: PreTrainedTokenizerBase
    unit = "example"
    duplicate_text = "with the same tokens and labels as an earlier one"
    keep_text = "kept because data.duplicates is keep"
    contradiction_hint = (
        "if one answer is right, correct the others; with data.group they stay on one side of the split"
    )
    overlap_text = "with the prompt of a training row"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: Path | None = None,
        log: LogFunction = ignore_line,
        images: ImagePlacer | None = None,
    ) -> None:
        super().__init__(settings, tokenizer, log=log)
        self.images = images
        self._folder = folder

    @functools.cached_property
    def _end_names(self) -> dict[int, str]:
        """Return the names of the tokens that end a text."""
        tokenizer = self.tokenizer
        end_tokens = terminators_in(self._folder, tokenizer) if self._folder else [int(tokenizer.eos_token_id)]
        return {end: str(tokenizer.convert_ids_to_tokens(end)) for end in end_tokens}

    def read(self, train: Train, seed: int | None = None) -> ReadResult:
        settings = self.settings if seed is not None else replace(self.settings, rows=None, group=None)
        rows, report, ends = read_stored(
            sources_of(train), settings, self.tokenizer, self.bad, seed=seed or 0, log=self._log, images=self.images
        )
        ordinals = None if seed is None else rows.ordinals()
        view = RowView(rows, np.arange(len(rows)))
        return ReadResult(view, rows.keys(), rows.groups(), report, ordinals, ends)

    def collect(self, train: Train) -> DataStatistics:
        statistics = collect_statistics(train, self.settings, self.tokenizer, [*self._end_names], self.images)
        ends = {self._end_names[token]: count for token, count in statistics.end_tokens.most_common()}
        return replace(statistics, ends=ends)

    def without_limits(self) -> TextReader:
        return self  # limits are not applied to statistics

    def length_findings(self, train: DataStatistics) -> list[DataFinding]:
        return text_length_findings(train, self.settings, self._end_names)

    def describe_contradictions(self, num_rows: int, num_contents: int) -> str:
        num_examples = f"({count_of(num_rows, 'example')})"
        return f"{count_of(num_contents, 'prompt')} with different answers in different rows {num_examples}"

    def row_findings(self, train: DataStatistics) -> list[DataFinding]:
        return text_findings(train)

    def eval_findings(self, train: DataStatistics, evaluation: DataStatistics, name: str) -> list[DataFinding]:
        findings = long_text_findings(evaluation, self.settings, f" of {name}")
        return [*findings, *super().eval_findings(train, evaluation, name)]

    def summary_findings(self, train: DataStatistics) -> list[DataFinding]:
        return text_summary_findings(train, self.settings)

    def rows(self, bad: BadRows) -> Iterator[RowPreview]:
        settings = self.settings
        encoder = Encoder(self.tokenizer, settings.template, settings.labels, settings.date, self.images)
        for source in sources_of(settings.train):
            stream = open_source(source.reference, bad.add, max_bytes=settings.max_row_bytes)
            stream.scan()
            source_settings = replace(settings, columns=settings.columns if source.columns is None else source.columns)
            for chunk in stream.chunks():
                form = choose_form(chunk, source.form or settings.form, source_settings.columns)
                for index in range(len(chunk)):
                    yield self._row(encoder, form, source_settings, chunk, index)

    def _row(
        self, encoder: Encoder, form: RowFormat, settings: DataSettings, rows: NumberedRows, index: int
    ) -> RowPreview:
        rejects_long = settings.long_rows == "error"
        bad = BadRows("skip")
        reader = ChunkReader(encoder, form, replace(settings, max_length=UNLIMITED) if rejects_long else settings, bad)
        (examples,) = reader.read(rows, [index])
        previews = []
        for example in examples:
            parts = tuple(token_spans(example.tokens, example.is_label, self.tokenizer))
            previews.append(ExamplePreview(len(example), example.label_count, parts))
        action = "refused" if settings.bad_rows == "error" else "skipped"
        notes = [f"{action}: {line['error']}" for line in bad.lines()]
        if any(len(example) > settings.max_length for example in examples):
            notes.append(f"refused: longer than data.max_length ({settings.max_length:,} tokens)")
        notes += _notes_of(reader.account, settings.max_length)
        return RowPreview(rows.number(index), rows.row_location(index), tuple(previews), tuple(notes))


class ChunkReader:
    """Converts the rows of one source to examples with labels and at most ``data.max_length`` tokens.

    Args:
        encoder: Renders and tokenizes records.
        form: Row format.
        settings: Provides ``columns``, ``system``, ``max_length`` and ``long_rows``.
        bad: Collects unusable rows.

    Attributes:
        account: Counts of all rows read so far.
        systems: Counts of their system messages.
        long: Rows that exceed the length limit while ``data.long_rows`` is "error".
    """

    def __init__(self, encoder: Encoder, form: RowFormat, settings: DataSettings, bad: BadRows) -> None:
        self.account = Account()
        self.systems = Systems()
        self.long = LongRows()
        self._encoder = encoder
        self._form = form
        self._settings = settings
        self._bad = bad

    def read(self, rows: NumberedRows, indices: Sequence[int]) -> list[list[Example]]:
        """Return the list of examples of each row at ``indices``.

        A row becomes several examples if its template renders earlier turns differently when more turns follow, or if
        it is divided. They have the same ``row`` and are on the same side of a split.

        Raises:
            BadRowError: if a row is unusable, and ``data.bad_rows`` is "error".
        """
        locations = [rows.row_location(index) for index in indices]

        def on_bad(position: int, error: BadRowError) -> None:
            self._bad.add(error, rows[indices[position]][1])

        with_images = self._encoder.images is not None
        read = read_records(rows, indices, self._form, self._settings.columns, on_bad, images=with_images)
        records = [with_system(record, self._settings.system) for record in read]
        encoded = self._encoder.encode(records, locations, on_bad)
        result: list[list[Example]] = []
        for position, (index, record, parts) in enumerate(zip(indices, records, encoded, strict=True)):
            examples: list[Example] = []
            if record is not None and parts:
                try:
                    examples = self._examples(rows[index][0], record, parts, locations[position])
                except BadRowError as error:
                    on_bad(position, error)
                count_system(self.systems, system_of(record))
            result.append(examples)
        return result

    def _examples(self, number: int, record: Record, parts: list[Encoded], location: str) -> list[Example]:
        limit = self._settings.max_length
        account = self.account
        settings = self._settings
        longest = max(len(part.tokens) for part in parts)
        labels = sum(stop - start for part in parts for start, stop in part.spans)
        images = self._encoder.images
        divided = any(would_split_image(part.tokens, settings, images) for part in parts)
        if longest > limit and settings.long_rows == "split" and labels and not divided:
            parts = split_long(record, parts, self._encoder, limit, location)
            account["split"] += 1
            account["split_examples"] += len(parts)
        elif len(parts) > 1:
            account["unrolled"] += 1
            account["unrolled_examples"] += len(parts)
        account["trailing_turns"] += getattr(record, "trailing", 0) > 0
        examples = [(part.example(number),) for part in parts]
        limited = (limit_length(part, location, settings, account, self.long, images) for part in examples)
        return [example for part in limited for example in part or ()]


def _notes_of(account: Account, limit: int) -> list[str]:
    """Return remarks about a row, derived from its counts."""
    notes = {
        "unrolled": "{unrolled_examples} examples, since the template rewrites earlier turns",
        "split": "divided into {split_examples} examples of at most {limit:,} tokens",
        "cut": "truncated to {limit:,} tokens: {tokens_cut:,} lost, {labels_cut:,} of them labels",
        "dropped_long": "dropped: longer than data.max_length ({limit:,} tokens), {labels_dropped:,} labels lost",
        "without_label": "dropped: no label",
        "trailing_turns": "truncated after the assistant's last turn",
    }
    counts = Counter({**account, "limit": limit})
    return [note.format_map(counts) for name, note in notes.items() if account[name]]


# Stored examples, their report, and the cumulative number of rows of each source.
StoredRows: TypeAlias = tuple[RowStore, PreparationReport, list[int]]


def read_stored(
    sources: Sequence[MixtureSource],
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    *,
    seed: int = 0,
    log: LogFunction,
    images: ImagePlacer | None = None,
) -> StoredRows:
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
    with contextlib.ExitStack() as stack:
        cache = _cache(reader, tokenizer, stack)
        read = None if cache is None else cache.find(reader.from_cache)
        if read is None:
            read = reader.read_into(stack.enter_context(RowWriter(cache)))
    bad.extend(reader.bad.lines())
    return read


def _cache(reader: _SourceReader, tokenizer: PreTrainedTokenizerBase, stack: contextlib.ExitStack) -> RowCache | None:
    """Return the cache entry of these rows, or None if they should not be cached or cannot be identified."""
    settings = reader.settings
    if settings.cache is False or (settings.cache == "auto" and reader.num_bytes <= TINY_BYTES):
        return None
    if reader.encoder.images is not None:
        return None
    dependencies = reader.dependencies(tokenizer)
    if dependencies is None:
        return None
    try:
        return stack.enter_context(RowCache(cache_key(dependencies), reader.log))
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
    def num_bytes(self) -> int:
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

    def from_cache(self, rows: RowStore, metadata: dict[str, Any], skipped: Path) -> StoredRows:
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
        return rows, PreparationReport(source=self.name, **counts), list(metadata["ends"])

    def read_into(self, writer: RowWriter) -> StoredRows:
        """Read all usable rows into ``writer``.

        Raises:
            UserError: if a row is unusable, or no usable row exists.
        """
        forms = self._scan()
        counts = [stream.rows for stream in self.streams]
        chosen = choose_rows(sum(counts), self.settings.rows, self.seed)
        progress = ReadProgress(self.log, f"tokenizing {self.name}", self.num_bytes)
        account = Account()
        long = LongRows()
        systems = Systems()
        count = num_processes() if self.num_bytes > PARALLEL_BYTES and self.encoder.images is None else 1
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
        store = self.settings.cache is True or self.num_bytes > LARGE_BYTES or progress.seconds > LONG_SECONDS
        about = f"{self.name}: {len(writer):,} examples"
        rows = writer.finish(about, metadata, store=store, write_skipped=self.bad.write if self.bad else None)
        return rows, report, list(metadata["ends"])

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
"""Index of the source, rows of a chunk, indices of the rows to read, and number of rows before the chunk."""


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
