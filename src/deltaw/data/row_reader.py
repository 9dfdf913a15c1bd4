"""From a file's rows to examples, whatever the task: a task says what one row becomes, all else is here, once.

Rows are opened, chosen, skipped with a reason, counted, deduplicated, split, checked and shown. They are held in
memory; :mod:`deltaw.data.prepare` streams text from files of any size. Knows neither models nor batches.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from deltaw.data.check import Check, Finding, bad_rows_found, lengths_of, ordered
from deltaw.data.chunk import Account, LongRows, Systems, limited, nothing_left, shared_system
from deltaw.data.columns import require_columns
from deltaw.data.example import RowGroup, rows_of
from deltaw.data.formats import check_columns, require
from deltaw.data.messages import without_nulls
from deltaw.data.mixture import Train, shown, sources_of
from deltaw.data.pieces import Piece, pieces
from deltaw.data.report import BadRowError, BadRows, Progress, Report, Say, count_of, silent
from deltaw.data.row_files import OnBad
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row, Rows
from deltaw.data.sequences import joined
from deltaw.data.settings import DataSettings
from deltaw.data.sources import (
    check_group,
    choose,
    divide,
    evaluated,
    group_keys,
    groups_of,
    keys_of,
    read_rows,
    skipping_named,
)
from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Longer than any row.
UNLIMITED = 2**30
_SHOWN = 5  # places that a finding names

# Rows that are tokenized at once.
ROWS_AT_ONCE = 4096

Item = TypeVar("Item")
Text = TypeVar("Text")
Tokens = TypeVar("Tokens")


@dataclass(frozen=True)
class RunData:
    """The rows of a run.

    Attributes:
        train, held_out: rows, or groups of rows.
        report: the account of all rows.
        skipped: rows that cannot be used (``data.bad_rows: skip``).
        classes: names of the classes in the order of the model's outputs; None where there are none.
        eval_sets: all sets of held-out rows by name, the first of which is ``held_out``; empty where
            ``data.eval`` gives no names.
        read_peak_bytes: the most main memory that the process held while tokenizer and rows were read; 0
            where nobody measured it.
    """

    train: Sequence[Any]
    held_out: Sequence[Any]
    report: Report
    skipped: BadRows = field(default_factory=BadRows)
    classes: tuple[str, ...] | None = None
    eval_sets: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    read_peak_bytes: int = 0

    @property
    def sets(self) -> Mapping[str, Sequence[Any]]:
        """The sets of held-out rows by name, in their order; one set without a name is called ''."""
        return self.eval_sets or ({"": self.held_out} if len(self.held_out) else {})

    @property
    def every(self) -> Sequence[Any]:
        """All rows, those to train on first."""
        return joined(self.train, *(self.sets.values() or [self.held_out]))

    def mapped(self, change: Callable[[Sequence[Any]], Sequence[Any]]) -> RunData:
        """With all rows as ``change`` makes them."""
        held_out = change(self.held_out)
        sets = {name: held_out if rows is self.held_out else change(rows) for name, rows in self.eval_sets.items()}
        return replace(self, train=change(self.train), held_out=held_out, eval_sets=sets)


@dataclass(frozen=True)
class ShownExample:
    """One example of a row.

    Attributes:
        tokens, labels: how many. pieces: its text.
        label: of a labeled row, the class or the number.
    """

    tokens: int
    labels: int
    pieces: tuple[Piece, ...]
    label: str | None = None


@dataclass(frozen=True)
class ShownRow:
    """One row of a file and what it becomes.

    Attributes:
        row: its number. where: its place. examples: none if it is not used.
        notes: what happens to it, if not just one example comes of it.
    """

    row: int
    where: str
    examples: tuple[ShownExample, ...]
    notes: tuple[str, ...] = ()


class Reader(Protocol):
    """What a task does with the rows that its settings name."""

    def prepared(self, seed: int = 0) -> RunData:
        """The rows of a run; ``seed`` chooses rows (``data.rows``) and those that are held out.

        Raises:
            UserError: the data cannot be used; the message names the file and the row.
        """

    def file(self, reference: str) -> tuple[Sequence[Any], Report]:
        """One file as evaluation data, with all its rows, duplicates included.

        Raises:
            UserError: the data cannot be used; the message names the file and the row.
        """

    def check(self, apart: Sequence[str]) -> Check:
        """What is wrong, or may be, with the training rows and with the separate evaluation files ``apart``."""

    def rows(self, bad: BadRows) -> Iterator[ShownRow]:
        """The training rows, one after another, and what they become; those without a place in it, as they cannot
        be read, are put into ``bad`` before the first row of their source is given."""


class RowReader(abc.ABC, Generic[Item]):
    """Reads rows into memory. A subclass writes :meth:`example`: one row in, an example or a group of them out.

    Args:
        settings: the ``data:`` section. tokenizer: of the model to be trained.
        say: told how far a long reading is.

    Attributes:
        columns_task: task whose columns (:mod:`deltaw.data.columns`) the rows must have; empty for any columns.
        form: what the rows are, for reports. noun: a row, in messages.
        template: how rows become text, for the report: "chat", "plain", or nothing.
        needs, can_use: columns that each row has, or may have.
        too_long, same, torn, torn_hint: of findings: rows that are too long, that come twice, and that contradict
            each other. torn_by_content: whether these are counted by their contents, or by rows.
        classes: names of the classes, of labeled rows. date: that the template writes into rows.
        predicts: names of the predictions for rows that were read to predict them.
        bad: rows that cannot be used. errors: the same by index, of the rows that were read last.
        account, long: what became of the others. systems: their system messages.
    """

    columns_task = ""
    predicts: tuple[str, ...] = ()
    form = "rows"
    noun = "a row"
    template = ""
    needs: tuple[str, ...] = ()
    can_use: tuple[str, ...] = ()
    too_long = "longer than"
    same = "with the same content as an earlier one"
    torn, torn_hint = "with the content of another row and another label", "if one is right, remove the other"
    torn_by_content = True
    classes: tuple[str, ...] | None = None
    date: str | None = None

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None = None, *, say: Say = silent
    ) -> None:
        if settings.long_rows == "split":
            raise UserError(f"{self.noun} cannot be divided", where="data.long_rows: split", hint="set cut or drop")
        self.settings = settings
        self.tokenizer = tokenizer
        self.bad = BadRows(settings.bad_rows)
        self.errors: dict[int, BadRowError] = {}
        self.account, self.long, self.systems = Account(), LongRows(), Systems()
        self._say = say

    def example(self, row: Row, number: int, where: str) -> Item:
        """What a row becomes: an :class:`deltaw.data.example.Example`, or a group of them.

        Args:
            row: its columns, under the names that the task knows. number: of the row in its file.
            where: its place, for errors.

        Raises:
            BadRowError: it cannot be used.
        """
        raise NotImplementedError

    def examples(self, rows: Rows, indices: Sequence[int]) -> Iterator[Item | None]:
        """What each of the rows at ``indices`` becomes; None for one that is skipped or dropped, which is
        counted. A subclass that reads many rows at once does it here."""
        for index in indices:
            where, row, found = rows.place(index), self.row(rows, index), None
            try:
                require(row, self.needs, where, f"every row has {', '.join(map(repr, self.needs))}")
                found = self.limited(self.example(row, rows.number(index), where), where)
            except BadRowError as error:
                self.skip(rows, index, error)
            yield found

    def key(self, item: Item) -> bytes:
        """Equal for duplicates."""
        return b"".join(map(key_of, rows_of(item)))  # type: ignore[arg-type]

    def content(self, item: Item) -> bytes:
        """Equal for rows of which no two should differ in their key."""
        return self.key(item)

    def groups(self, items: Sequence[Item]) -> list[Hashable]:
        """Equal for rows that are all trained on or all held out, unless ``data.group`` says which; None for a
        row that is its own group."""
        return [None] * len(items)

    def completed(self, items: list[Item], seed: int) -> Sequence[Any]:
        """Rows of one side of the split as they are trained on or evaluated."""
        return items

    def told(self, report: Report, items: Sequence[Item]) -> Report:
        """The report with what only rows of this kind have."""
        return report

    def findings(self, items: Sequence[Item], report: Report) -> list[Finding]:
        """What a check finds that only rows of this kind have."""
        return []

    def notes(self, item: Item) -> list[str]:
        """What a person is told of a row that is shown."""
        return []

    def show(self, row: Any, item: Item) -> ShownExample:
        """One of an item's rows for a person to see."""
        assert self.tokenizer is not None
        return ShownExample(len(row), row.label_count, tuple(pieces(row.tokens, row.is_label, self.tokenizer)))

    def read_source(self, reference: str, on_bad: OnBad | None) -> Rows:
        """The rows of one source."""
        return read_rows(reference, on_bad, max_bytes=self.settings.max_row_bytes)

    @skipping_named()
    def prepared(self, seed: int = 0) -> RunData:
        items, groups, report = self._read(self.settings.train, seed)
        report = replace(report, source=shown(self.settings.train))
        keys, of_groups = keys_of(items, self.key), group_keys(groups)
        train, held_out, report = divide(
            items, keys, of_groups, report, self.settings, seed=seed, read_apart=self._read_apart
        )
        sides = self.completed(list(train), seed), self.completed(list(held_out), seed)
        return RunData(*sides, self.told(report, train), self.bad, self.classes)

    @skipping_named()
    def file(self, reference: str) -> tuple[Sequence[Any], Report]:
        items, _, report = self._read_apart(reference)
        return self.completed(items, 0), report

    def _read_apart(self, reference: Train) -> tuple[list[Item], np.ndarray, Report]:
        items, _, report = self._read(reference)
        keys = keys_of(items, self.key)
        return items, keys, self.told(evaluated(items, report, keys), items)

    def row(self, rows: Rows, index: int) -> Row:
        """A row under the names that the task knows (``data.columns``)."""
        row = rows[index][1]
        if rows.fills_nulls:
            row = {column: without_nulls(value) for column, value in row.items()}
        return {**row, **{ours: row.get(theirs) for ours, theirs in self.settings.columns.items()}}

    def skip(self, rows: Rows, index: int, error: BadRowError) -> None:
        """Count a row that cannot be used, or raise its error (``data.bad_rows``)."""
        self.errors[index] = error
        self.bad.add(error, rows[index][1])

    def limited(self, item: Item, where: str) -> Item | None:
        """At most ``data.max_length`` tokens a row; None if the item is dropped, which is counted."""
        rows = limited(rows_of(item), where, self.settings, self.account, self.long)  # type: ignore[arg-type]
        if rows is None or not isinstance(item, RowGroup):
            return rows and rows[0]  # type: ignore[return-value]
        return replace(item, rows=rows)

    def encoded(
        self,
        rows: Rows,
        indices: Sequence[int],
        read: Callable[[int], Text],
        encode: Callable[[list[Text]], Sequence[Tokens]],
    ) -> Iterator[tuple[int, Text, Tokens] | None]:
        """Yield the index, the texts and the tokens of each row, many of which are tokenized at once. Yield None for a
        row that ``read`` rejects, which is skipped."""
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

    def is_kept(self, where: str, lengths: Sequence[int]) -> bool:
        """Apply ``data.long_rows`` to a row whose texts have these lengths in tokens, and count it if one is too long.
        Return False if it is not used."""
        longest, limit, way = max(lengths), self.settings.max_length, self.settings.long_rows
        if longest > limit and way == "error":
            self.long.add(LongRows(1, where, longest, longest))
        elif longest > limit and way == "drop":
            self.account["dropped_long"] += 1
        elif longest > limit:
            self.account["cut"] += 1
            self.account["tokens_cut"] += sum(max(0, length - limit) for length in lengths)
        return longest <= limit or way == "cut"

    def usable(self, rows: Rows, chosen: Sequence[int]) -> Sequence[int]:
        """Those of the chosen rows that :meth:`examples` is asked for."""
        return chosen

    def used_columns(self) -> set[str | None]:
        """The file's columns that are read."""
        return {self.settings.columns.get(name, name) for name in self.needs + self.can_use}

    def _open(self, train: Train) -> Rows:
        """All rows.

        Raises:
            UserError: they cannot be read, or lack a column.
        """
        on_bad = self.bad.add if self.bad.mode == "skip" else None
        found = []
        for source in sources_of(train):
            if source.weight != 1 or source.columns is not None or source.form is not None:
                what = f"a source whose rows are {self.form} has no weight, columns or form of its own"
                hint = "name the sources alone: data.train: [a.jsonl, b.jsonl]"
                raise UserError(what, where=f"data.train, {source.reference}", hint=hint)
            found.append(self.read_source(source.reference, on_bad))
            self._check_columns(found[-1])
        return found[0] if len(found) == 1 else Rows.joined(shown(train), found)

    def _check_columns(self, rows: Rows) -> None:
        columns = self.settings.columns
        check_columns(rows, columns)
        require_columns(self.columns_task, rows.columns, rows.name, columns)
        there = (set(rows.columns) - set(columns.values())) | set(columns)
        lacking = [column for column in self.needs if column not in there]
        if lacking:
            where = f"{rows.name}, whose columns are {', '.join(map(repr, rows.columns))}"
            hint = f"{did_you_mean(lacking[0], rows.columns)}; map other names with data.columns: {{{lacking[0]}: …}}"
            raise UserError(f"{self.form} need the column '{lacking[0]}'", where=where, hint=hint)

    def _read(self, train: Train, seed: int | None = None) -> tuple[list[Item], list[Hashable], Report]:
        """All usable rows, or those that ``seed`` chooses, their groups, and the report.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        known = self.bad.counts.copy()
        self.errors = {}
        self.account, self.long, self.systems = Account(), LongRows(), Systems()
        group = self.settings.group if seed is not None else None
        rows = self._open(train)
        unreadable = (self.bad.counts - known).total()
        check_group(rows.name, rows.columns, group)
        chosen = range(len(rows)) if seed is None else choose(len(rows), self.settings.rows, seed)
        usable = self.usable(rows, chosen)
        items: list[Item] = []
        kept: list[int] = []
        progress = Progress(self._say, f"tokenizing {rows.name}", 0)
        for done, (index, item) in enumerate(zip(usable, self.examples(rows, usable), strict=True), start=1):
            if item is not None:
                items.append(item)
                kept.append(index)
            progress.at(done, 0)
        if self.long.count:
            raise self.long.error(self.settings.max_length, can_split=False)
        if not items:
            skipped = (self.bad.counts - known).total()
            raise nothing_left(rows.name, self.account, self.bad, skipped, "raise data.max_length, or check the labels")
        used = self.used_columns() | {self.settings.group}
        report = Report(
            source=rows.name,
            form=self.form,
            template=self.template,
            rows_read=len(rows) + unreadable,
            rows_kept=len(items),
            not_chosen=len(rows) - len(chosen),
            unused_columns=tuple(column for column in rows.columns if column not in used),
            bad_rows=dict(self.bad.counts - known),
            date=self.date,
            **shared_system(self.systems),
            **self.account,  # type: ignore[arg-type]
        )
        return items, groups_of(rows, kept, group) if group else self.groups(items), report

    def _whole(self) -> RowReader[Item]:
        """A reader of the same rows that refuses none and shortens none."""
        whole = copy.copy(self)
        whole.settings = replace(self.settings, bad_rows="skip", long_rows="cut", max_length=UNLIMITED)
        whole.bad = BadRows("skip")
        return whole

    def check(self, apart: Sequence[str]) -> Check:
        reader, settings, source = self._whole(), self.settings, shown(self.settings.train)
        items, _, report = reader._read_apart(settings.train)
        report = replace(report, source=source)
        keys, contents = list(map(self.key, items)), list(map(self.content, items))
        known, of_content, again = set[bytes](), dict[bytes, set[bytes]](), list[Item]()
        for item, key, content in zip(items, keys, contents, strict=True):
            of_content.setdefault(content, set()).add(key)
            again += [item] if key in known else []
            known.add(key)
        torn = [item for item, content in zip(items, contents, strict=True) if len(of_content[content]) > 1]
        several = sum(len(of_one) > 1 for of_one in of_content.values()) if self.torn_by_content else len(torn)
        kept = "dropped" if settings.duplicates == "drop" else "kept"
        found = bad_rows_found(reader.bad, settings, "")
        found += self._long(items, source)
        found.append(_finding("duplicates", again, source, f"{self.same} ({kept})"))
        found.append(_finding("contradictions", torn, source, self.torn, self.torn_hint, several))
        found += reader.findings(items, report)
        if bare := report.without_label:
            found.append(Finding("without_label", "warning", bare, f"{count_of(bare)} without a label (dropped)"))
        for name in apart:
            of_file = reader._whole()
            others = of_file._read_apart(name)[0]
            found += bad_rows_found(of_file.bad, settings, f" of {name}")
            exact = [item for item in others if self.key(item) in known]
            alike = [item for item in others if self.key(item) not in known and self.content(item) in of_content]
            said = f"of {name} that are also training rows, which inflates the scores"
            found.append(_finding("overlap", exact, name, said, "remove them from one of the files"))
            said = f"of {name} with the content of a training row and another label"
            found.append(_finding("prompt_overlap", alike, name, said))
        lengths = np.array(self._lengths(items))
        return Check(
            source,
            report.form,
            report.template,
            report.rows_read,
            len(lengths) or len(items),
            int(lengths.sum()),
            report.label_tokens if report.template else None,
            lengths_of(lengths),
            ordered(found),
            class_counts=report.class_counts,
        )

    def rows(self, bad: BadRows) -> Iterator[ShownRow]:
        reader, limit, source = self._whole(), self.settings.max_length, shown(self.settings.train)
        reader.bad = bad
        for item in reader._read_apart(self.settings.train)[0]:
            notes = self.notes(item)
            if max(self._lengths([item]), default=0) > limit:
                notes.append(f"longer than data.max_length ({limit:,} tokens): {self.settings.long_rows}")
            examples = tuple(reader.show(row, item) for row in rows_of(item))  # type: ignore[arg-type]
            row = item.row  # type: ignore[attr-defined]
            yield ShownRow(row, f"{source}, row {row}", examples, tuple(notes))

    def _lengths(self, items: Sequence[Item]) -> list[int]:
        """Tokens of each row of these items."""
        return [len(row) for item in items for row in rows_of(item) if hasattr(row, "tokens")]  # type: ignore[arg-type]

    def _long(self, items: Sequence[Item], source: str) -> list[Finding]:
        limit, way = self.settings.max_length, self.settings.long_rows
        long = [item for item in items if max(self._lengths([item]), default=0) > limit]
        done = {"error": "", "drop": ": dropped", "cut": ": truncated"}.get(way, "")
        text = f"{self.too_long} data.max_length ({limit:,} tokens){done}"
        hint = f"data.max_length: {max(self._lengths(long), default=0)} fits all"
        found = _finding("long_rows", long, source, text, hint)
        return [replace(found, level="error" if way == "error" else "warning")]


def _finding(
    name: str, items: Sequence[Any], source: str, text: str, hint: str | None = None, count: int | None = None
) -> Finding:
    """A warning about these items of a file; ``count`` where not they are counted."""
    places = tuple(f"{source}, row {item.row}" for item in items[:_SHOWN])
    return Finding(
        name, "warning", len(items) if count is None else count, f"{count_of(len(items))} {text}", hint, places
    )
