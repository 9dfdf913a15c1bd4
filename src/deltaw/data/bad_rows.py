"""Rows that cannot be used: an error at the first of them, or skipped, counted by reason and listed.

The list is a temporary file, since a large file may have many such rows. It knows no format and no tokenizer.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Literal

from deltaw.durable import replacing
from deltaw.errors import UserError

SKIPPED_ROWS = "skipped_rows.jsonl"
# The most bytes that a row may have in its file, unless ``data.max_row_bytes`` says otherwise. Tokenizing
# takes up to 160 times a row's bytes in memory.
MAX_ROW_BYTES = 16 * 2**20
TOO_LONG = "longer than data.max_row_bytes"
# Characters of a skipped row that are listed, and of what is said of it: it may quote the row.
_SHOWN, _SAID = 2000, 500


class BadRowError(UserError):
    """One row cannot be used; others may be.

    Args:
        what, where, hint: as for every error of the user's.
        reason: the kind of fault in a few words, the same for all rows that have it.
    """

    def __init__(self, what: str, *, reason: str, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what if len(what) <= _SAID else what[:_SAID] + "…", where=where, hint=hint)
        self.reason = reason


def too_long(what: str, max_bytes: int, *, where: str, size: int | None = None, hint: str = "") -> UserError:
    """The error for a row that is not read because of its length.

    Args:
        what: what is too long, as in ``"line 7"``. where: its place.
        size: its bytes, where they are known without reading it. hint: what else may be wrong.
    """
    has = "has more" if size is None else f"has {size:,} bytes, more"
    return UserError(
        f"{what} {has} than the {max_bytes:,} bytes that a row may have",
        where=where,
        hint=(hint and f"{hint}; ") + "if it is meant to be that long, raise data.max_row_bytes",
    )


# Told the place of a row in a chunk and why it cannot be used; returns if the row is to be skipped.
Refuse = Callable[[int, BadRowError], None]


def refuse(place: int, error: BadRowError) -> None:
    """The :data:`Refuse` that skips nothing."""
    raise error


class BadRows:
    """Rows that were skipped.

    Args:
        mode: as ``data.bad_rows``: "error" raises for the first such row, "skip" lists it.

    Attributes:
        counts: rows by reason.
    """

    def __init__(self, mode: Literal["error", "skip"] = "error") -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter()
        self._file: IO[bytes] | None = None

    @classmethod
    def read(cls, path: Path) -> BadRows:
        """The rows that :meth:`write` wrote."""
        found = cls("skip")
        with path.open("rb") as lines:
            for line in lines:
                found._put(json.loads(line))
        return found

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, error: BadRowError, row: object) -> None:
        """Skip one row, or raise ``error``."""
        if self.mode == "error":
            raise error
        shown = _shown(row)
        self._put({"where": error.where, "reason": error.reason, "error": error.what, "row": shown})

    def add_unreadable(self, error: UserError, reason: str, row: object) -> None:
        """As :meth:`add`, for a row that a file's reader cannot read."""
        self.add(BadRowError(error.what, reason=reason, where=error.where, hint=error.hint), row)

    def extend(self, other: BadRows) -> None:
        """Add rows that were skipped elsewhere."""
        self.put(other.lines())

    def put(self, lines: Iterable[dict[str, object]]) -> None:
        """Add rows as :meth:`lines` tells them."""
        for line in lines:
            self._put(line)

    def lines(self) -> Iterator[dict[str, object]]:
        """Each skipped row: ``where``, ``reason``, ``error``, and the ``row``; of a long one, its first
        characters as a string."""
        if self._file is None:
            return
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, 2)

    def write(self, path: Path) -> None:
        """Write the list as JSON Lines."""
        with replacing(path) as temporary, temporary.open("wb") as to:
            if self._file is not None:
                self._file.seek(0)
                shutil.copyfileobj(self._file, to)
                self._file.seek(0, 2)

    def _put(self, line: dict[str, object]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self.counts[str(line["reason"])] += 1
        # Half of a surrogate pair has no UTF-8; its escape is JSON.
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self._file.write(text + b"\n")


def _shown(row: object) -> object:
    """A row for the list; a long one, and one with numbers that JSON does not have, as a string."""
    if isinstance(row, bytes):
        row = row.decode("utf-8", "replace")
    text = json.dumps(row, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
    if len(text) > _SHOWN:
        return (row if isinstance(row, str) else text)[:_SHOWN] + "…"
    try:
        return json.loads(json.dumps(json.loads(text), allow_nan=False))
    except ValueError:
        return text
