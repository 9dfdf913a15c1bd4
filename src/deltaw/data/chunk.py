"""A chunk of rows becomes examples, and the account of what was lost on the way.

It knows records, templates and limits; not files, duplicates or splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from deltaw.data.example import Example
from deltaw.data.formats import Form, read_records
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError


class ChunkReader:
    """Reads the rows of one source, chunk after chunk.

    Attributes:
        account: by field of :class:`deltaw.data.report.Report`, how many rows or tokens.
    """

    def __init__(self, encoder: Encoder, form: Form, settings: DataSettings) -> None:
        self.account: Counter[str] = Counter()
        self._long: tuple[str, int] | None = None
        self._long_count = self._longest = 0
        self._encoder = encoder
        self._form = form
        self._settings = settings

    def read(self, rows: Rows, indices: Sequence[int]) -> list[list[Example]]:
        """The examples of each of the rows at ``indices``."""
        settings, account = self._settings, self.account
        records = read_records(rows, indices, self._form, settings.columns)
        account["trailing_turns"] += sum(getattr(record, "trailing", 0) > 0 for record in records)
        encoded = self._encoder.encode(records, [rows.place(index) for index in indices])
        lists: list[list[Example]] = []
        for index, row in zip(indices, encoded, strict=True):
            lists.append([])
            excess = len(row.tokens) - settings.max_length
            if excess > 0:
                self._long = self._long or (rows.place(index), len(row.tokens))
                self._long_count, self._longest = self._long_count + 1, max(self._longest, len(row.tokens))
                account["dropped_long"] += settings.long_rows == "drop"
                if settings.long_rows != "cut":
                    continue
            example = _example(rows.number(index), row, settings.max_length)
            if not example.is_label.any():
                account["without_label"] += 1
                continue
            if excess > 0:
                account["cut"] += 1
                account["tokens_cut"] += excess
            lists[-1].append(example)
        return lists

    def check(self) -> None:
        """Raise a UserError if rows were longer than allowed."""
        if self._long is not None and self._settings.long_rows == "error":
            place, length = self._long
            raise too_long(
                place,
                length,
                count=self._long_count,
                longest=self._longest,
                limit=self._settings.max_length,
            )


def too_long(place: str, length: int, *, count: int, longest: int, limit: int) -> UserError:
    """The error for ``count`` rows of more than ``limit`` tokens, the first at ``place`` with ``length``."""
    many = f"{count:,} rows are" if count > 1 else "1 row is"
    return UserError(
        f"{many} longer than {limit:,} tokens; the first has {length:,}",
        where=place,
        hint=f"set data.max_length: {longest} to fit all, or data.long_rows: cut (truncate) or drop",
    )


def _example(number: int, encoded: Encoded, max_length: int) -> Example:
    tokens = np.asarray(encoded.tokens[:max_length], dtype=np.int32)
    is_label = np.zeros(len(tokens), dtype=bool)
    for start, end in encoded.spans:
        is_label[start:end] = True
    return Example(number, tokens, is_label, min(encoded.prompt_length, len(tokens)), encoded.answer)
