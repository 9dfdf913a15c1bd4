"""Rows with answers to a prompt become groups of examples; a row that becomes none is counted.

What the columns mean is a subclass's: :mod:`deltaw.data.preferences` reads pairs, :mod:`deltaw.data.unpaired`
single answers. It knows neither models nor batches.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from deltaw.data.bad_rows import BadRowError, BadRows, Refuse
from deltaw.data.chunk import Account, LongRows, example_of
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, check_columns
from deltaw.data.messages import without_nulls
from deltaw.data.mixture import Train, shown, sources_of
from deltaw.data.progress import Progress, Say
from deltaw.data.report import Report
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row, Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import read_rows
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows tokenized at once


class AnswerReader(abc.ABC):
    """Reads files whose rows are a prompt with answers.

    Attributes:
        needs, can_use: columns that each row has, or may have. answers: the columns with answers.
        form: of the rows, for the report. noun: a row, in messages.
        bad: told of rows that cannot be used.
    """

    can_use: ClassVar[tuple[str, ...]] = ("prompt", "system", "tools")
    needs: ClassVar[tuple[str, ...]]
    answers: ClassVar[tuple[str, ...]]
    form: ClassVar[str]
    noun: ClassVar[str]

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, bad: BadRows, say: Say
    ) -> None:
        refused = {
            "data.long_rows": (
                settings.long_rows == "split",
                f"{self.noun} cannot be divided",
                "cut or drop",
            ),
            "data.form": (settings.form != "auto", f"{self.noun} has one form", "auto"),
        }
        for key, (is_refused, what, right) in refused.items():
            if is_refused:
                raise UserError(what, where=key, hint=f"set it to {right}")
        self.bad = bad
        self.tokenizer = tokenizer
        self.settings = settings
        self.encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        self._say = say
        self._known = bad.counts.copy()

    @abc.abstractmethod
    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        """Each answer of a row with its prompt.

        Raises:
            BadRowError: a value is missing or has the wrong type.
        """

    def encode(
        self, records: Sequence[Record | None], places: Sequence[str], on_bad: Refuse
    ) -> list[list[Encoded]]:
        """The tokens of records, as :meth:`deltaw.data.templates.Encoder.encode`."""
        return self.encoder.encode(records, places, on_bad)

    @abc.abstractmethod
    def same(self, where: str) -> BadRowError:
        """What is said of a row whose answers do not differ."""

    def group(self, examples: tuple[Example, ...], row: Row) -> RowGroup:
        """The row as what a loss sees together."""
        return RowGroup(examples)

    def open(self, train: Train) -> Rows:
        """All rows.

        Raises:
            UserError: they cannot be read, or lack a column.
        """
        self._known = self.bad.counts.copy()
        on_bad = self.bad.add_unreadable if self.bad.mode == "skip" else None
        found = []
        for source in sources_of(train):
            if source.weight != 1 or source.columns is not None or source.form is not None:
                raise UserError(
                    f"a source whose rows are {self.form} has no weight, columns or form of its own",
                    where=f"data.train, {source.reference}",
                    hint="name the sources alone: data.train: [a.jsonl, b.jsonl]",
                )
            found.append(read_rows(source.reference, on_bad, max_bytes=self.settings.max_row_bytes))
            self._check_columns(found[-1])
        return found[0] if len(found) == 1 else Rows.joined(shown(train), found)

    def _check_columns(self, rows: Rows) -> None:
        columns = self.settings.columns
        check_columns(rows, columns)
        there = (set(rows.columns) - set(columns.values())) | set(columns)
        lacking = [column for column in self.needs if column not in there]
        if lacking:
            raise UserError(
                f"{self.form} need the column '{lacking[0]}'",
                where=f"{rows.name}, whose columns are {', '.join(map(repr, rows.columns))}",
                hint=f"{did_you_mean(lacking[0], rows.columns)}; map other names with data.columns: "
                f"{{{lacking[0]}: …}}",
            )

    def read(self, rows: Rows, chosen: Sequence[int]) -> tuple[list[RowGroup], list[int], Report]:
        """The usable rows among ``chosen`` as groups, their indices in ``rows``, and the report.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        unreadable = len(self.bad) - self._known.total()
        account, long = Account(), LongRows()
        groups: list[RowGroup] = []
        kept: list[int] = []
        progress = Progress(self._say, f"tokenizing {rows.name}", 0)
        for start in range(0, len(chosen), _CHUNK):
            part = list(chosen[start : start + _CHUNK])
            for index, encoded in zip(part, self._encoded(rows, part), strict=True):
                group = None if encoded is None else self._group(rows, index, encoded, account, long)
                if group is not None:
                    groups.append(group)
                    kept.append(index)
            progress.at(start + len(part), 0)
        limit = self.settings.max_length
        if long.count:
            raise long.error(limit, can_split=False)
        skipped = self.bad.counts - self._known
        if not groups:
            raise UserError(
                f"no row is left: {account.dropped_long:,} are too long, {account.without_label:,} have an "
                f"answer without a label, {skipped.total():,} cannot be used",
                where=rows.name,
                hint="raise data.max_length, or check the answers",
            )
        columns = self.settings.columns
        used = {columns.get(name, name) for name in self.needs + self.can_use} | {self.settings.group}
        return (
            groups,
            kept,
            Report(
                source=rows.name,
                form=self.form,
                template=self.encoder.template,
                rows_read=len(rows) + unreadable,
                rows_kept=len(groups),
                not_chosen=len(rows) - len(chosen),
                unused_columns=tuple(column for column in rows.columns if column not in used),
                date=self.encoder.dated,
                bad_rows=dict(skipped),
                **account.as_dict(),
            ),
        )

    def _encoded(self, rows: Rows, indices: Sequence[int]) -> list[list[list[Encoded]] | None]:
        """The tokens of each row's answers; None for a row that cannot be used."""
        count = len(self.answers)
        records: list[Record | None] = []
        places: list[str] = []
        bad: set[int] = set()

        def on_bad(place: int, error: BadRowError) -> None:
            if place // count not in bad:
                bad.add(place // count)
                self.bad.add(error, rows[indices[place // count]][1])

        for number, index in enumerate(indices):
            row, where = rows[index][1], rows.place(index)
            if rows.fills_nulls:
                row = {column: without_nulls(value) for column, value in row.items()}
            columns = self.settings.columns
            row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
            found: tuple[Record | None, ...] = (None,) * count
            try:
                found = self.records(row, where)
            except BadRowError as error:
                on_bad(count * number, error)
            records += found
            places += [f"{where}, {column}" for column in self.answers]
        encoded = self.encode(records, places, on_bad)
        return [
            None if number in bad else encoded[count * number : count * (number + 1)]
            for number in range(len(indices))
        ]

    def _group(
        self,
        rows: Rows,
        index: int,
        encoded: list[list[Encoded]],
        account: Account,
        long: LongRows,
    ) -> RowGroup | None:
        """A row; None if it is dropped, which is counted."""
        where, (number, row) = rows.place(index), rows[index]
        if max(map(len, encoded)) > 1:
            error = BadRowError(
                "the template rewrites earlier turns of an answer with several, so it is no single row",
                reason="an answer of several turns that the template rewrites",
                where=where,
                hint="let the answers be one turn each, or set data.labels: last",
            )
            self.bad.add(error, row)
            return None
        if not all(encoded):
            account.without_label += 1
            return None
        examples = tuple(example_of(number, parts[0]) for parts in encoded)
        if not _differ(examples):
            self.bad.add(self.same(where), row)
            return None
        limited = self._limited(examples, where, account, long)
        if limited is None:
            return None
        columns = self.settings.columns
        try:
            return self.group(limited, {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}})
        except BadRowError as error:
            self.bad.add(error, row)
            return None

    def _limited(
        self, examples: tuple[Example, ...], where: str, account: Account, long: LongRows
    ) -> tuple[Example, ...] | None:
        """At most ``data.max_length`` tokens an answer; None if the row is dropped, which is counted."""
        limit, way = self.settings.max_length, self.settings.long_rows
        longest = max(map(len, examples))
        labels = sum(example.label_count for example in examples)
        if longest > limit and way == "error":
            long.add(where, longest)
            return None
        if longest > limit and way == "drop":
            account.dropped_long += 1
            account.labels_dropped += labels
            return None
        shortened = tuple(example.shortened(limit) for example in examples)
        account.labels_cut += labels - sum(example.label_count for example in shortened)
        if not all(example.label_count for example in shortened) or not _differ(shortened):
            account.without_label += 1  # nothing is left that tells the answers apart
            return None
        if longest > limit:
            account.cut += 1
            account.tokens_cut += sum(map(len, examples)) - sum(map(len, shortened))
        return shortened


def _differ(examples: tuple[Example, ...]) -> bool:
    """Whether no two answers of a row are the same tokens."""
    return len({key_of(example) for example in examples}) == len(examples)
