"""Some rows of a source become examples, and every row that becomes none, or several, is counted.

It is given rows in chunks, and knows neither where they come from nor where the examples go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.example import Example
from deltaw.data.formats import Form, Record, read_records
from deltaw.data.long_rows import split_long
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError


@dataclass
class Account:
    """What became of rows besides one example each; the counts of :class:`deltaw.data.report.Report` that
    bear these names."""

    trailing_turns: int = 0
    without_label: int = 0
    unrolled: int = 0
    unrolled_examples: int = 0
    cut: int = 0
    tokens_cut: int = 0
    labels_cut: int = 0
    dropped_long: int = 0
    labels_dropped: int = 0
    split: int = 0
    split_examples: int = 0

    def __add__(self, other: Account) -> Account:
        theirs = other.as_dict()
        return Account(**{name: count + theirs[name] for name, count in self.as_dict().items()})

    def as_dict(self) -> dict[str, Any]:
        """The counts, all of them integers, by name."""
        return dataclasses.asdict(self)


@dataclass
class LongRows:
    """Rows that are too long where that is an error: how many, the first, its tokens, and the longest."""

    count: int = 0
    first: str = ""
    tokens: int = 0
    longest: int = 0

    def add(self, where: str, tokens: int) -> None:
        """Count one more."""
        if not self.count:
            self.first, self.tokens = where, tokens
        self.count += 1
        self.longest = max(self.longest, tokens)

    def error(self, limit: int, *, can_split: bool = True) -> UserError:
        """What is said of them."""
        many = f"{self.count:,} rows are" if self.count > 1 else "1 row is"
        ways = "cut (truncate), drop, or split" if can_split else "cut (truncate) or drop"
        return UserError(
            f"{many} longer than {limit:,} tokens; the first has {self.tokens:,}",
            where=self.first,
            hint=f"set data.max_length: {self.longest} to fit all, or data.long_rows: {ways}",
        )


class ChunkReader:
    """Makes examples of at most ``data.max_length`` tokens, which have labels, of the rows of one source.

    Args:
        encoder: renders and tokenizes.
        form: the format of the rows.
        settings: ``columns``, ``max_length`` and ``long_rows`` are read.
        bad: told of rows that cannot be used.

    Attributes:
        account: of all rows read so far.
        long: rows that are too long, where that is an error.
    """

    def __init__(self, encoder: Encoder, form: Form, settings: DataSettings, bad: BadRows) -> None:
        self.account = Account()
        self.long = LongRows()
        self._encoder = encoder
        self._form = form
        self._settings = settings
        self._bad = bad

    def read(self, rows: Rows, indices: Sequence[int]) -> list[list[Example]]:
        """The examples of the rows at ``indices``, of each in a list of its own.

        Several come of one row if its template renders earlier turns differently once more turns follow, or
        if it is divided. They have the same ``row`` and belong on the same side of a split.

        Raises:
            BadRowError: a row cannot be used, and ``data.bad_rows`` is "error".
        """
        places = [rows.place(index) for index in indices]

        def on_bad(place: int, error: BadRowError) -> None:
            self._bad.add(error, rows[indices[place]][1])

        records = read_records(rows, indices, self._form, self._settings.columns, on_bad)
        encoded = self._encoder.encode(records, places, on_bad)
        found: list[list[Example]] = []
        for place, (index, record, parts) in enumerate(zip(indices, records, encoded, strict=True)):
            examples: list[Example] = []
            if record is not None and parts:
                try:
                    examples = self._examples(rows[index][0], record, parts, places[place])
                except BadRowError as error:
                    on_bad(place, error)
            found.append(examples)
        return found

    def check(self) -> None:
        """Raise a UserError if rows are too long and that is an error."""
        if self.long.count:
            raise self.long.error(self._settings.max_length)

    def _examples(self, number: int, record: Record, parts: list[Encoded], where: str) -> list[Example]:
        limit, account = self._settings.max_length, self.account
        longest = max(len(part.tokens) for part in parts)
        labels = sum(stop - start for part in parts for start, stop in part.spans)
        if longest > limit and self._settings.long_rows == "split" and labels:
            parts = split_long(record, parts, self._encoder, limit, where)
            account.split += 1
            account.split_examples += len(parts)
        elif len(parts) > 1:
            account.unrolled += 1
            account.unrolled_examples += len(parts)
        account.trailing_turns += getattr(record, "trailing", 0) > 0
        examples = [self._example(number, part, where) for part in parts]
        return [example for example in examples if example is not None]

    def _example(self, number: int, part: Encoded, where: str) -> Example | None:
        """One example; None if it is dropped, which is counted."""
        limit, account, long_rows = self._settings.max_length, self.account, self._settings.long_rows
        example = example_of(number, part)
        excess = len(example) - limit
        if excess > 0 and long_rows == "error":
            self.long.add(where, len(example))
            return None
        if excess > 0 and long_rows == "drop":
            account.dropped_long += 1
            account.labels_dropped += example.label_count
            return None
        if excess > 0:
            whole = example.label_count
            example = example.shortened(limit)
            account.labels_cut += whole - example.label_count
        if not example.label_count:
            account.without_label += 1
            return None
        if excess > 0:
            account.cut += 1
            account.tokens_cut += excess
        return example


def example_of(number: int, part: Encoded) -> Example:
    """Tokens and spans as arrays."""
    tokens = np.asarray(part.tokens, dtype=np.int32)
    is_label = np.zeros(len(tokens), dtype=bool)
    for start, end in part.spans:
        is_label[start:end] = True
    return Example(number, tokens, is_label, min(part.prompt_length, len(tokens)), part.answer)
