"""Base class of readers that convert file rows to examples in memory.

Rows are opened, chosen, skipped with a reason, counted, deduplicated, split, checked and displayed in the same way for
all tasks. :mod:`deltaw.data.prepare.prepare` streams text from files of any size instead.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows, OnBad
from deltaw.data.check import DataCheck, bad_row_findings, sort_findings, summarize_lengths
from deltaw.data.chunk import Account, LongRows, Systems, limit_length, no_rows_error, shared_system
from deltaw.data.data_findings import DataFinding
from deltaw.data.example import RowGroup, TokenSpan, concat_rows, rows_of, token_spans
from deltaw.data.formats import check_columns, require
from deltaw.data.messages import drop_nulls
from deltaw.data.read_progress import ReadProgress
from deltaw.data.report import PreparationReport, count_of
from deltaw.data.row_images import ImagePlacer
from deltaw.data.row_selection import (
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
MAX_LOCATIONS = 5  # maximum number of row locations in a finding

# Rows per tokenizer call.
ROWS_AT_ONCE = 4096

Item = TypeVar("Item")
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


class Reader(Protocol):
    """Interface of a task's data reader."""

    def prepare(self, seed: int = 0) -> RunData:
        """Return the rows of a run.

        Args:
            seed: Seed for choosing rows (``data.rows``) and for holding rows out.

        Raises:
            UserError: if the data cannot be used. The message names the file and the row.
        """

    def file(self, reference: str) -> tuple[Sequence[Any], PreparationReport]:
        """Read one file as evaluation data, with all rows including duplicates.

        Raises:
            UserError: if the data cannot be used. The message names the file and the row.
        """

    def check(self, eval_files: Sequence[str]) -> DataCheck:
        """Check the training rows and separate evaluation files.

        Args:
            eval_files: References of evaluation files.
        """

    def rows(self, bad: BadRows) -> Iterator[RowPreview]:
        """Yield the training rows with their examples.

        Args:
            bad: Collects rows that cannot be read, before the first row of their source is yielded.
        """


class RowReader(abc.ABC, Generic[Item]):
    """Reads rows into memory. A subclass implements :meth:`example`, which converts a row to an example or a group.

    Args:
        settings: The ``data:`` section.
        tokenizer: Tokenizer of the model.
        log: Receives progress lines.

    Attributes:
        columns_task: Task whose columns (:mod:`deltaw.settings.columns`) the rows must have, or empty for any columns.
        form: Description of the rows, for reports.
        noun: Description of one row, for messages.
        template: "chat", "plain" or an empty string, for the report.
        needs: Required columns.
        can_use: Optional columns.
        too_long_text: Text of the finding about rows that are too long.
        duplicate_text: Text of the finding about duplicates.
        contradiction_text: Text of the finding about contradicting rows.
        contradiction_hint: Hint of the finding about contradicting rows.
        contradictions_by_content: Count contradicting contents instead of rows.
        classes: Class names of labeled rows.
        date: Date that the template writes into rows.
        predicts: Names of the predictions, for rows read for prediction.
        bad: Unusable rows.
        errors: Errors of the unusable rows of the last read, by index.
        account: Counts of skipped and changed rows.
        long: Rows that exceed the length limit.
        systems: Counts of system messages.
        images: See :class:`deltaw.data.templates.Encoder`.
    """

    columns_task = ""
    predicts: tuple[str, ...] = ()
    images: ImagePlacer | None = None
    form = "rows"
    noun = "a row"
    template = ""
    needs: tuple[str, ...] = ()
    can_use: tuple[str, ...] = ()
    too_long_text = "longer than"
    duplicate_text = "with the same content as an earlier one"
    contradiction_text = "with the content of another row and another label"
    contradiction_hint = "if one is right, remove the other"
    contradictions_by_content = True
    classes: tuple[str, ...] | None = None
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
        self.settings = settings
        self.tokenizer = tokenizer
        self.bad = BadRows(settings.bad_rows)
        self.errors: dict[int, BadRowError] = {}
        self.account = Account()
        self.long = LongRows()
        self.systems = Systems()
        self._log = log

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

    def finalize(self, items: list[Item], seed: int) -> Sequence[Any]:
        """Convert the rows of one side of the split to their final form."""
        return items

    def add_counts(self, report: PreparationReport, items: Sequence[Item]) -> PreparationReport:
        """Add counts that are specific to this kind of rows to the report."""
        return report

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

    @row_errors()
    def prepare(self, seed: int = 0) -> RunData:
        items, groups, report = self._read(self.settings.train, seed)
        report = replace(report, source=format_sources(self.settings.train))
        keys = keys_of(items, self.key)
        group_digests = group_keys(groups)
        train, eval_rows, report = split_rows(
            items, keys, group_digests, report, self.settings, seed=seed, read_eval=self._read_eval
        )
        sides = self.finalize(list(train), seed), self.finalize(list(eval_rows), seed)
        return RunData(*sides, self.add_counts(report, train), self.bad, self.classes)

    @row_errors()
    def file(self, reference: str) -> tuple[Sequence[Any], PreparationReport]:
        items, _, report = self._read_eval(reference)
        return self.finalize(items, 0), report

    def _read_eval(self, reference: Train) -> tuple[list[Item], np.ndarray, PreparationReport]:
        items, _, report = self._read(reference)
        keys = keys_of(items, self.key)
        return items, keys, self.add_counts(with_eval_counts(items, report, keys), items)

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

    def _read(self, train: Train, seed: int | None = None) -> tuple[list[Item], list[Hashable], PreparationReport]:
        """Return all usable rows, or those that ``seed`` chooses, with their groups and the report.

        Raises:
            UserError: if a row is unusable, or no usable row exists.
        """
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
        return items, groups_of(rows, kept_indices, group) if group else self.groups(items), report

    def _without_limits(self) -> RowReader[Item]:
        """Return a reader of the same rows that skips unusable rows and does not apply the length limit."""
        reader = copy.copy(self)
        reader.settings = replace(self.settings, bad_rows="skip", long_rows="cut", max_length=UNLIMITED)
        reader.bad = BadRows("skip")
        return reader

    def check(self, eval_files: Sequence[str]) -> DataCheck:
        reader = self._without_limits()
        settings = self.settings
        source = format_sources(self.settings.train)
        items, _, report = reader._read_eval(settings.train)
        report = replace(report, source=source)
        keys = list(map(self.key, items))
        contents = list(map(self.content, items))
        known_keys = set[bytes]()
        keys_by_content = dict[bytes, set[bytes]]()
        duplicates = list[Item]()
        for item, key, content in zip(items, keys, contents, strict=True):
            keys_by_content.setdefault(content, set()).add(key)
            duplicates += [item] if key in known_keys else []
            known_keys.add(key)
        contradictions = [item for item, text in zip(items, contents, strict=True) if len(keys_by_content[text]) > 1]
        num_contents = sum(len(content_keys) > 1 for content_keys in keys_by_content.values())
        num_contradictions = num_contents if self.contradictions_by_content else len(contradictions)
        action = "dropped" if settings.duplicates == "drop" else "kept"
        findings = bad_row_findings(reader.bad, settings, "")
        findings += self._long(items, source)
        findings.append(_finding("duplicates", duplicates, source, f"{self.duplicate_text} ({action})"))
        text = self.contradiction_text
        hint = self.contradiction_hint
        findings.append(_finding("contradictions", contradictions, source, text, hint, num_contradictions))
        findings += reader.findings(items, report)
        if unlabeled := report.without_label:
            text = f"{count_of(unlabeled)} without a label (dropped)"
            findings.append(DataFinding("without_label", "warning", unlabeled, text))
        for name in eval_files:
            file_reader = reader._without_limits()
            eval_items = file_reader._read_eval(name)[0]
            findings += bad_row_findings(file_reader.bad, settings, f" of {name}")
            exact = [item for item in eval_items if self.key(item) in known_keys]
            others = [item for item in eval_items if self.key(item) not in known_keys]
            contradicting = [item for item in others if self.content(item) in keys_by_content]
            text = f"of {name} that are also training rows, which inflates the scores"
            findings.append(_finding("overlap", exact, name, text, "remove them from one of the files"))
            text = f"of {name} with the content of a training row and another label"
            findings.append(_finding("prompt_overlap", contradicting, name, text))
        lengths = np.array(self._lengths(items))
        label_tokens = report.label_tokens if report.template else None
        counts = report.rows_read, len(lengths) or len(items), int(lengths.sum()), label_tokens
        results = summarize_lengths(lengths), sort_findings(findings), report.class_counts
        check = DataCheck(source, report.form, report.template, *counts, *results)
        return replace(check, label_numbers=report.label_numbers)

    def rows(self, bad: BadRows) -> Iterator[RowPreview]:
        reader = self._without_limits()
        limit = self.settings.max_length
        source = format_sources(self.settings.train)
        reader.bad = bad
        for item in reader._read_eval(self.settings.train)[0]:
            notes = self.notes(item)
            if max(self._lengths([item]), default=0) > limit:
                notes.append(f"longer than data.max_length ({limit:,} tokens): {self.settings.long_rows}")
            examples = tuple(reader.show(row, item) for row in rows_of(item))  # type: ignore[arg-type]
            row = item.row  # type: ignore[attr-defined]
            yield RowPreview(row, f"{source}, row {row}", examples, tuple(notes))

    def _lengths(self, items: Sequence[Item]) -> list[int]:
        """Return the number of tokens of each row of these items."""
        return [len(row) for item in items for row in rows_of(item) if hasattr(row, "tokens")]  # type: ignore[arg-type]

    def _long(self, items: Sequence[Item], source: str) -> list[DataFinding]:
        limit = self.settings.max_length
        policy = self.settings.long_rows
        long = [item for item in items if max(self._lengths([item]), default=0) > limit]
        action = {"error": "", "drop": ": dropped", "cut": ": truncated"}.get(policy, "")
        text = f"{self.too_long_text} data.max_length ({limit:,} tokens){action}"
        hint = f"data.max_length: {max(self._lengths(long), default=0)} fits all"
        finding = _finding("long_rows", long, source, text, hint)
        return [replace(finding, level="error" if policy == "error" else "warning")]


def _finding(
    name: str, items: Sequence[Any], source: str, text: str, hint: str | None = None, count: int | None = None
) -> DataFinding:
    """Return a warning about items of a file, with ``count`` (by default the number of items)."""
    locations = tuple(f"{source}, row {item.row}" for item in items[:MAX_LOCATIONS])
    count = len(items) if count is None else count
    return DataFinding(name, "warning", count, f"{count_of(len(items))} {text}", hint, locations)
