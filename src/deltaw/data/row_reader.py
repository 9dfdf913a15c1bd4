"""Base classes of the readers of tasks.

Rows are deduplicated, split, reported and checked in the same way for all tasks. Storage differs: :class:`RowReader`
keeps rows as objects in memory, and :class:`deltaw.data.stored_rows.TextReader` streams text from files of any size.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows, OnBad
from deltaw.data.check import (
    DataCheck,
    bad_row_findings,
    long_row_findings,
    overlap_findings,
    sort_findings,
    summarize_lengths,
)
from deltaw.data.data_findings import DataFinding
from deltaw.data.data_statistics import DataStatistics
from deltaw.data.example import RowGroup, TokenSpan, concat_rows, rows_of, token_spans
from deltaw.data.formats import check_columns, require
from deltaw.data.long_rows import LongRows, limit_length
from deltaw.data.messages import drop_nulls
from deltaw.data.read_progress import ReadProgress
from deltaw.data.report import Account, PreparationReport, Systems, count_of, no_rows_error, shared_system
from deltaw.data.row_images import ImagePlacer
from deltaw.data.row_selection import (
    ReadResult,
    check_group,
    choose_rows,
    group_keys,
    groups_of,
    keys_of,
    split_rows,
    with_eval_counts,
)
from deltaw.data.row_store import key_of
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.sources import read_rows, row_errors
from deltaw.errors import UserError, did_you_mean
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.columns import require_columns
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import Train, format_sources, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Length limit that no row reaches.
UNLIMITED = 2**30

# Rows per tokenizer call.
ROWS_AT_ONCE = 4096

Item = TypeVar("Item")
ReaderType = TypeVar("ReaderType", bound="Reader")
Text = TypeVar("Text")
Tokens = TypeVar("Tokens")


@dataclass(frozen=True)
class RunData:
    """Training and evaluation rows of a run.

    Attributes:
        train: Training rows, or groups of rows.
        held_out: Evaluation rows, or groups of rows.
        report: Row counts of the preparation.
        skipped: Unusable rows (``data.bad_rows: skip``).
        classes: Class names in the order of the model's outputs, or None.
        eval_sets: Evaluation rows by set name, of which ``held_out`` is the first set. Empty if ``data.eval`` has no
            names.
        read_peak_bytes: Peak main memory of the process while tokenizer and rows were loaded, or 0 if not measured.
        read_seconds: Time of loading tokenizer and rows, or 0 if not measured.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    report: PreparationReport
    skipped: BadRows = field(default_factory=BadRows)
    classes: tuple[str, ...] | None = None
    eval_sets: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    read_peak_bytes: int = 0
    read_seconds: float = 0.0

    @property
    def sets(self) -> Mapping[str, Sequence[Any]]:
        """Return the evaluation rows by set name, in order. A set without a name is called ''."""
        return self.eval_sets or ({"": self.held_out} if len(self.held_out) else {})

    @property
    def all_rows(self) -> Sequence[Any]:
        """Return all rows, training rows first."""
        return concat_rows(self.train, *(self.sets.values() or [self.held_out]))

    def map_rows(self, transform: Callable[[Sequence[Any]], Sequence[Any]]) -> RunData:
        """Return a copy with ``transform`` applied to each sequence of rows."""
        eval_rows = transform(self.held_out)
        sets = {name: eval_rows if rows is self.held_out else transform(rows) for name, rows in self.eval_sets.items()}
        return replace(self, train=transform(self.train), held_out=eval_rows, eval_sets=sets)


@dataclass(frozen=True)
class ExamplePreview:
    """One example of a displayed row.

    Attributes:
        tokens: Number of tokens.
        labels: Number of labels.
        spans: Decoded text.
        label: Class name or number of a labeled row.
    """

    tokens: int
    labels: int
    spans: tuple[TokenSpan, ...]
    label: str | None = None


@dataclass(frozen=True)
class RowPreview:
    """One row of a file with its examples.

    Attributes:
        row: Row number.
        location: File and row, for display.
        examples: Examples of the row, empty if it is not used.
        notes: Remarks, if the row does not become exactly one example.
    """

    row: int
    location: str
    examples: tuple[ExamplePreview, ...]
    notes: tuple[str, ...] = ()


class Reader(abc.ABC):
    """Reads the rows of a task. A subclass implements :meth:`read` and defines how rows are stored: :class:`RowReader`
    as objects in memory, :class:`deltaw.data.stored_rows.TextReader` as compact token arrays that can be cached.

    Args:
        settings: The ``data:`` section.
        tokenizer: Tokenizer of the model.
        log: Receives progress lines.

    Attributes:
        classes: Class names of labeled rows.
        images: See :class:`deltaw.data.templates.Encoder`.
        bad: Unusable rows.
        unit: Name of a checked item in findings.
        too_long_text: Text of the finding about rows that are too long.
        duplicate_text: Text of the finding about duplicates.
        keep_text: Reason for which duplicates are kept, for this finding.
        contradiction_hint: Hint of the finding about contradicting rows.
        contradictions_by_content: Count contradicting contents instead of rows.
        overlap_text: Text of the finding about evaluation rows with the content of a training row.
    """

    classes: tuple[str, ...] | None = None
    images: ImagePlacer | None = None
    unit = "row"
    too_long_text = "longer than"
    duplicate_text = "with the same content as an earlier one"
    keep_text = "kept"
    contradiction_hint = "if one is right, remove the other"
    contradictions_by_content = True
    overlap_text = "with the content of a training row and another label"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        log: LogFunction = ignore_line,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.bad = BadRows(settings.bad_rows)
        self._log = log

    @abc.abstractmethod
    def read(self, train: Train, seed: int | None = None) -> ReadResult:
        """Return all usable rows of ``train`` (see ``data.train``), or those that ``seed`` chooses (``data.rows``).

        Raises:
            UserError: if a row is unusable, or no usable row exists.
        """

    @abc.abstractmethod
    def collect(self, train: Train) -> DataStatistics:
        """Return statistics of all rows of ``train`` for :meth:`check`, regardless of their length."""

    @abc.abstractmethod
    def rows(self, bad: BadRows) -> Iterator[RowPreview]:
        """Yield the training rows with their examples.

        Args:
            bad: Collects rows that cannot be read, before the first row of their source is yielded.
        """

    def finalize(self, items: Sequence[Any], seed: int) -> Sequence[Any]:
        """Convert the rows of one side of the split to their final form."""
        return items

    def add_counts(self, report: PreparationReport, items: Sequence[Any]) -> PreparationReport:
        """Add counts that are specific to this kind of rows to the report."""
        return report

    @row_errors()
    def prepare(self, seed: int = 0) -> RunData:
        """Return the rows of a run.

        Args:
            seed: Seed for choosing rows (``data.rows``), holding rows out, and sampling fractions of sources.

        Raises:
            UserError: if the data cannot be used. The message names the file and the row.
        """
        read = self.read(self.settings.train, seed)
        train, eval_rows, report = split_rows(read, self.settings, seed=seed, read_eval=self._read_eval)
        sides = self.finalize(train, seed), self.finalize(eval_rows, seed)
        return RunData(*sides, self.add_counts(report, train), self.bad, self.classes)

    @row_errors()
    def file(self, reference: str) -> tuple[Sequence[Any], PreparationReport]:
        """Read one file as evaluation data, with all rows including duplicates.

        Raises:
            UserError: if the data cannot be used. The message names the file and the row.
        """
        read = self._read_eval(reference)
        return self.finalize(read.rows, 0), read.report

    def _read_eval(self, reference: Train) -> ReadResult:
        read = with_eval_counts(self.read(reference))
        return replace(read, report=self.add_counts(read.report, read.rows))

    def check(self, eval_files: Sequence[str]) -> DataCheck:
        """Check the training rows and separate evaluation files.

        Args:
            eval_files: References of evaluation files.
        """
        settings = self.settings
        reader = self.without_limits()
        train = reader.collect(settings.train)
        action = "dropped" if settings.duplicates == "drop" else self.keep_text
        duplicates = train.duplicates()
        contradictory, num_contents = train.contradictions()
        num_contradictions = num_contents if self.contradictions_by_content else len(contradictory)
        text = f"{count_of(len(duplicates), self.unit)} {self.duplicate_text} ({action})"
        findings = bad_row_findings(train.bad, settings, "")
        findings += self.length_findings(train)
        findings.append(DataFinding("duplicates", "warning", len(duplicates), text, rows=train.locations(duplicates)))
        text = self.describe_contradictions(len(contradictory), num_contents)
        locations = train.locations(contradictory)
        hint = self.contradiction_hint
        findings.append(DataFinding("contradictions", "warning", num_contradictions, text, hint, locations))
        findings += reader.row_findings(train)
        for name in eval_files:
            evaluation = reader.without_limits().collect(name)
            findings += bad_row_findings(evaluation.bad, settings, f" of {name}")
            findings += self.eval_findings(train, evaluation, name)
        findings += self.summary_findings(train)
        return DataCheck(
            source=format_sources(settings.train),
            form=train.form,
            template=train.template,
            rows=train.rows_read,
            examples=len(train.lengths) or train.rows,
            tokens=int(train.lengths.sum()),
            label_tokens=train.label_tokens,
            lengths=summarize_lengths(train.lengths),
            findings=sort_findings(findings),
            class_counts=train.class_counts,
            label_numbers=train.label_numbers,
            ends=train.ends,
        )

    def without_limits(self: ReaderType) -> ReaderType:
        """Return a reader of the same rows that skips unusable rows and does not apply the length limit."""
        reader = copy.copy(self)
        reader.settings = replace(self.settings, bad_rows="skip", long_rows="cut", max_length=UNLIMITED)
        reader.bad = BadRows("skip")
        return reader

    def length_findings(self, train: DataStatistics) -> list[DataFinding]:
        """Return findings about the number of tokens and labels of rows."""
        return long_row_findings(train, self.settings, self.too_long_text)

    @abc.abstractmethod
    def describe_contradictions(self, num_rows: int, num_contents: int) -> str:
        """Return the text of the finding about rows that contradict each other."""

    def row_findings(self, train: DataStatistics) -> list[DataFinding]:
        """Return findings that are specific to this kind of rows."""
        return []

    def eval_findings(self, train: DataStatistics, evaluation: DataStatistics, name: str) -> list[DataFinding]:
        """Return findings about a separate evaluation file."""
        return overlap_findings(train, evaluation, name, self.unit, self.overlap_text)

    def summary_findings(self, train: DataStatistics) -> list[DataFinding]:
        """Return notes about all rows."""
        return []


class RowReader(Reader, Generic[Item]):
    """Reads rows as objects in memory. A subclass implements :meth:`example`, which converts a row to an example or a
    group.

    Attributes:
        columns_task: Task whose columns (:mod:`deltaw.settings.columns`) the rows must have, or empty for any columns.
        form: Description of the rows, for reports.
        noun: Description of one row, for messages.
        template: "chat", "plain" or an empty string, for the report.
        needs: Required columns.
        can_use: Optional columns.
        contradiction_text: Text of the finding about contradicting rows.
        date: Date that the template writes into rows.
        predicts: Names of the predictions, for rows read for prediction.
        errors: Errors of the unusable rows of the last read, by index.
        account: Counts of skipped and changed rows.
        long: Rows that exceed the length limit.
        systems: Counts of system messages.
    """

    columns_task = ""
    predicts: tuple[str, ...] = ()
    form = "rows"
    noun = "a row"
    template = ""
    needs: tuple[str, ...] = ()
    can_use: tuple[str, ...] = ()
    contradiction_text = "with the content of another row and another label"
    date: str | None = None

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        log: LogFunction = ignore_line,
    ) -> None:
        if settings.long_rows == "split":
            raise UserError(f"{self.noun} cannot be divided", location="data.long_rows: split", hint="set cut or drop")
        super().__init__(settings, tokenizer, log=log)
        self.errors: dict[int, BadRowError] = {}
        self.account = Account()
        self.long = LongRows()
        self.systems = Systems()

    def example(self, row: Row, number: int, location: str) -> Item:
        """Convert a row to an :class:`deltaw.data.example.Example` or a group of examples.

        Args:
            row: Columns under the names that the task uses.
            number: Number of the row in its file.
            location: Location of the row, for errors.

        Raises:
            BadRowError: if the row is unusable.
        """
        raise NotImplementedError

    def examples(self, rows: NumberedRows, indices: Sequence[int]) -> Iterator[Item | None]:
        """Yield the example of each row at ``indices``, or None if the row is skipped or dropped (and counted).

        Subclasses that process rows in batches override this method.
        """
        for index in indices:
            location = rows.row_location(index)
            item = None
            try:
                row = self.read_row(rows, index)
                item = self.limit_length(self.example(row, rows.number(index), location), location)
            except BadRowError as error:
                self.skip(rows, index, error)
            yield item

    def key(self, item: Item) -> bytes:
        """Return bytes that are equal for duplicates."""
        return b"".join(map(key_of, rows_of(item)))  # type: ignore[arg-type]

    def content(self, item: Item) -> bytes:
        """Return bytes that are equal for rows that contradict each other if their keys differ."""
        return self.key(item)

    def groups(self, items: Sequence[Item]) -> list[Hashable]:
        """Return a value per row that is equal for rows on the same side of the split, or None for independent rows.

        ``data.group`` has precedence.
        """
        return [None] * len(items)

    def findings(self, items: Sequence[Item], report: PreparationReport) -> list[DataFinding]:
        """Return findings that are specific to this kind of rows."""
        return []

    def notes(self, item: Item) -> list[str]:
        """Return remarks for the display of a row."""
        return []

    def show(self, row: Any, item: Item) -> ExamplePreview:
        """Return a preview of one row of an item."""
        assert self.tokenizer is not None
        return ExamplePreview(len(row), row.label_count, tuple(token_spans(row.tokens, row.is_label, self.tokenizer)))

    def read_source(self, reference: str, on_bad: OnBad | None) -> NumberedRows:
        """Read the rows of one source."""
        return read_rows(reference, on_bad, max_bytes=self.settings.max_row_bytes)

    def row(self, rows: NumberedRows, index: int) -> Row:
        """Return a row with its columns under the names that the task uses (``data.columns``)."""
        row = rows[index][1]
        if rows.fills_nulls:
            row = {column: drop_nulls(value) for column, value in row.items()}
        return {**row, **{name: row.get(file_column) for name, file_column in self.settings.columns.items()}}

    def read_row(self, rows: NumberedRows, index: int) -> Any:
        """Return the content of a row before tokenization.

        Raises:
            BadRowError: if the row is unusable.
        """
        row = self.row(rows, index)
        require(row, self.needs, rows.row_location(index), f"every row has {', '.join(map(repr, self.needs))}")
        return row

    def usable_rows(self, rows: NumberedRows) -> list[int]:
        """Return the indices of the usable rows, as far as this is known without a tokenizer. Others are skipped."""
        usable = []
        for index in self.select_usable(rows, range(len(rows))):
            try:
                self.read_row(rows, index)
            except BadRowError as error:
                self.skip(rows, index, error)
            else:
                usable.append(index)
        return usable

    def skip(self, rows: NumberedRows, index: int, error: BadRowError) -> None:
        """Count an unusable row, or raise its error (``data.bad_rows``)."""
        self.errors[index] = error
        self.bad.add(error, rows[index][1])

    def limit_length(self, item: Item, location: str) -> Item | None:
        """Apply ``data.long_rows`` to an item. Return None if it is dropped (and counted)."""
        items: Any = rows_of(item)
        rows = limit_length(items, location, self.settings, self.account, self.long, self.images)
        if rows is None or not isinstance(item, RowGroup):
            return rows and rows[0]  # type: ignore[return-value]
        return replace(item, rows=rows)

    def encode_rows(
        self,
        rows: NumberedRows,
        indices: Sequence[int],
        read: Callable[[int], Text],
        encode: Callable[[list[Text]], Sequence[Tokens]],
    ) -> Iterator[tuple[int, Text, Tokens] | None]:
        """Yield the index, the texts and the tokens of each row, or None if ``read`` rejects the row.

        Args:
            read: Returns the texts of a row. A BadRowError skips the row.
            encode: Tokenizes the texts of several rows.
        """
        for start in range(0, len(indices), ROWS_AT_ONCE):
            part = indices[start : start + ROWS_AT_ONCE]
            texts: dict[int, Text] = {}
            for index in part:
                try:
                    texts[index] = read(index)
                except BadRowError as error:
                    self.skip(rows, index, error)
            tokens = dict(zip(texts, encode(list(texts.values())) if texts else [], strict=True))
            yield from ((index, texts[index], tokens[index]) if index in texts else None for index in part)

    def check_length(self, location: str, lengths: Sequence[int]) -> bool:
        """Apply ``data.long_rows`` to a row whose texts have these lengths in tokens, and count the row if one text is
        too long.

        Return False if the row is not used.
        """
        longest = max(lengths)
        limit = self.settings.max_length
        policy = self.settings.long_rows
        if longest > limit and policy == "error":
            self.long.add(LongRows(1, location, longest, longest))
        elif longest > limit and policy == "drop":
            self.account["dropped_long"] += 1
        elif longest > limit:
            self.account["cut"] += 1
            self.account["tokens_cut"] += sum(max(0, length - limit) for length in lengths)
        return longest <= limit or policy == "cut"

    def select_usable(self, rows: NumberedRows, chosen: Sequence[int]) -> Sequence[int]:
        """Return the chosen rows that are passed to :meth:`examples`."""
        return chosen

    @property
    def added_prefix(self) -> str | None:
        """Role header that is added to prompts, see :attr:`deltaw.data.templates.Encoder.added_prefix`."""
        return None

    def used_columns(self) -> set[str | None]:
        """Return the columns of the file that are read."""
        return {self.settings.columns.get(name, name) for name in self.needs + self.can_use}

    def _open(self, train: Train) -> NumberedRows:
        """Read all rows.

        Raises:
            UserError: if the rows cannot be read, or lack a column.
        """
        on_bad = self.bad.add if self.bad.mode == "skip" else None
        parts = []
        for source in sources_of(train):
            if source.weight != 1 or source.columns is not None or source.form is not None:
                message = f"a source with {self.form} cannot have its own weight, columns or form"
                hint = "list only the references: data.train: [a.jsonl, b.jsonl]"
                raise UserError(message, location=f"data.train, {source.reference}", hint=hint)
            parts.append(self.read_source(source.reference, on_bad))
            self._check_columns(parts[-1])
        return parts[0] if len(parts) == 1 else NumberedRows.concat(format_sources(train), parts)

    def _check_columns(self, rows: NumberedRows) -> None:
        columns = self.settings.columns
        check_columns(rows, columns)
        if self.columns_task:
            require_columns(self.columns_task, rows.columns, rows.name, columns)
        available = (set(rows.columns) - set(columns.values())) | set(columns)
        missing = [column for column in self.needs if column not in available]
        if missing:
            location = f"{rows.name}, whose columns are {', '.join(map(repr, rows.columns))}"
            hint = f"{did_you_mean(missing[0], rows.columns)}; map other names with data.columns: {{{missing[0]}: …}}"
            raise UserError(f"{self.form} need the column '{missing[0]}'", location=location, hint=hint)

    def read(self, train: Train, seed: int | None = None) -> ReadResult:
        previous_counts = self.bad.counts.copy()
        self.errors = {}
        self.account = Account()
        self.long = LongRows()
        self.systems = Systems()
        group = self.settings.group if seed is not None else None
        rows = self._open(train)
        unreadable = (self.bad.counts - previous_counts).total()
        check_group(rows.name, rows.columns, group)
        chosen = range(len(rows)) if seed is None else choose_rows(len(rows), self.settings.rows, seed)
        usable = self.select_usable(rows, chosen)
        items: list[Item] = []
        kept_indices: list[int] = []
        progress = ReadProgress(self._log, f"tokenizing {rows.name}", 0)
        for done, (index, item) in enumerate(zip(usable, self.examples(rows, usable), strict=True), start=1):
            if item is not None:
                items.append(item)
                kept_indices.append(index)
            progress.update(done, 0)
        if self.long.count:
            raise self.long.error(self.settings.max_length, can_split=False)
        if not items:
            skipped = (self.bad.counts - previous_counts).total()
            raise no_rows_error(rows.name, self.account, self.bad, skipped, "raise data.max_length or check the labels")
        used = self.used_columns() | {self.settings.group}
        report = PreparationReport(
            source=rows.name,
            form=self.form,
            template=self.template,
            rows_read=len(rows) + unreadable,
            rows_kept=len(items),
            not_selected=len(rows) - len(chosen),
            unused_columns=tuple(column for column in rows.columns if column not in used),
            bad_rows=dict(self.bad.counts - previous_counts),
            date=self.date,
            added_prefix=self.added_prefix,
            **shared_system(self.systems),
            **self.account,  # type: ignore[arg-type]
        )
        groups = groups_of(rows, kept_indices, group) if group else self.groups(items)
        return ReadResult(items, keys_of(items, self.key), group_keys(groups), report)

    def collect(self, train: Train) -> DataStatistics:
        read = self._read_eval(train)
        report = read.report
        source = format_sources(train)
        statistics = DataStatistics(
            form=report.form,
            template=report.template,
            rows=len(read.rows),
            rows_read=report.rows_read,
            bad=self.bad,
            read=read,
            lengths=np.array(self._lengths(read.rows)),
            label_tokens=report.label_tokens if report.template else None,
            class_counts=report.class_counts,
            label_numbers=report.label_numbers,
        )
        for item in read.rows:
            length = max(self._lengths([item]), default=0)
            statistics.add_item(item.row, source, length, key=self.key(item), content=self.content(item))
        return statistics

    def describe_contradictions(self, num_rows: int, num_contents: int) -> str:
        return f"{count_of(num_rows)} {self.contradiction_text}"

    def row_findings(self, train: DataStatistics) -> list[DataFinding]:
        assert train.read is not None
        report = train.read.report
        text = f"{count_of(report.without_label)} without a label (dropped)"
        unlabeled = DataFinding("without_label", "warning", report.without_label, text)
        return [*self.findings(train.read.rows, report), unlabeled]

    def rows(self, bad: BadRows) -> Iterator[RowPreview]:
        reader = self.without_limits()
        limit = self.settings.max_length
        source = format_sources(self.settings.train)
        reader.bad = bad
        for item in reader._read_eval(self.settings.train).rows:
            notes = self.notes(item)
            if max(self._lengths([item]), default=0) > limit:
                notes.append(f"longer than data.max_length ({limit:,} tokens): {self.settings.long_rows}")
            examples = tuple(reader.show(row, item) for row in rows_of(item))
            yield RowPreview(item.row, f"{source}, row {item.row}", examples, tuple(notes))

    def _lengths(self, items: Sequence[Item]) -> list[int]:
        """Return the number of tokens of each row of these items."""
        return [len(row) for item in items for row in rows_of(item) if hasattr(row, "tokens")]  # type: ignore[arg-type]
