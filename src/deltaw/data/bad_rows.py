"""Rows that cannot be used: errors, and the list of skipped rows."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Literal

from deltaw.atomic_files import atomic_path
from deltaw.errors import UserError

SKIPPED_ROWS = "skipped_rows.jsonl"
TOO_LONG = "longer than data.max_row_bytes"
SKIP_HINT = "or leave such rows out with data.bad_rows: skip"
# Maximum number of characters of a skipped row in the list.
_MAX_ROW_CHARS = 2000
# Maximum number of characters of its error message, which may quote the row.
_MAX_ERROR_CHARS = 500


class BadRowError(UserError):
    """Error for one unusable row. Other rows of the file may be usable.

    Args:
        message: As in :class:`deltaw.errors.UserError`, as are ``location`` and ``hint``.
        reason: Short description of the error, identical for all rows with this error.
    """

    def __init__(self, message: str, *, reason: str, location: str | None = None, hint: str | None = None) -> None:
        text = message if len(message) <= _MAX_ERROR_CHARS else message[:_MAX_ERROR_CHARS] + "…"
        super().__init__(text, location=location, hint=hint)
        self.reason = reason

    def of_file(self) -> UserError:
        """Return the error as one of the entire file, for errors after which the next row cannot be located."""
        return UserError(self.message, location=self.location, hint=self.hint)


def too_long_error(row: str, max_bytes: int, *, location: str, size: int | None = None, hint: str = "") -> BadRowError:
    """Return the error for a row that exceeds the size limit.

    Args:
        row: Description of the row, for example ``"line 7"``.
        size: Size of the row in bytes, if known without reading it.
        hint: Other possible causes.
    """
    has = "has more" if size is None else f"has {size:,} bytes, more"
    message = f"{row} {has} than the {max_bytes:,} bytes that a row may have"
    hint = (hint and f"{hint}; ") + "if the length is correct, raise data.max_row_bytes"
    return BadRowError(message, reason=TOO_LONG, location=location, hint=hint)


# Receives the index of a row in a chunk and the reason why it is unusable. Returns if the row should be skipped.
OnBadRow = Callable[[int, BadRowError], None]


def raise_error(index: int, error: BadRowError) -> None:
    """Raise the error of the first unusable row: an :data:`OnBadRow` that skips no rows."""
    raise error


class BadRows:
    """Skipped rows, stored in a temporary file.

    Args:
        mode: As in ``data.bad_rows``: "error" raises the first error, "skip" collects the rows.

    Attributes:
        counts: Number of rows per reason.
    """

    def __init__(self, mode: Literal["error", "skip"] = "error") -> None:
        self.mode = mode
        self.counts: Counter[str] = Counter()
        self._file: IO[bytes] | None = None

    @classmethod
    def read(cls, path: Path) -> BadRows:
        """Read the rows that :meth:`write` wrote."""
        bad_rows = cls("skip")
        with path.open("rb") as lines:
            bad_rows.extend(map(json.loads, lines))
        return bad_rows

    def __len__(self) -> int:
        return self.counts.total()

    def add(self, error: BadRowError, row: object) -> None:
        """Skip a row, or raise ``error``."""
        if self.mode == "error":
            raise error
        self._put({"where": error.location, "reason": error.reason, "error": error.message, "row": _listed_row(row)})

    def extend(self, lines: Iterable[dict[str, object]]) -> None:
        """Add rows in the format of :meth:`lines`."""
        for line in lines:
            self._put(line)

    def lines(self) -> Iterator[dict[str, object]]:
        """Yield each skipped row: ``where`` (its location), ``reason``, ``error`` and ``row``. Long rows are truncated
        strings.
        """
        if self._file is None:
            return
        self._file.seek(0)
        for line in self._file:
            yield json.loads(line)
        self._file.seek(0, 2)

    def write(self, path: Path) -> None:
        """Write the rows as JSON Lines."""
        with atomic_path(path) as temporary, temporary.open("wb") as target:
            if self._file is not None:
                self._file.seek(0)
                shutil.copyfileobj(self._file, target)
                self._file.seek(0, 2)

    def _put(self, line: dict[str, object]) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self.counts[str(line["reason"])] += 1
        # Lone surrogates have no UTF-8 encoding but a valid JSON escape.
        self._file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def _listed_row(row: object) -> object:
    """Return a row as a JSON value: a string if it is long or contains numbers that JSON cannot represent."""
    if isinstance(row, bytes):
        row = row.decode("utf-8", "replace")
    text = json.dumps(row, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>")
    if len(text) > _MAX_ROW_CHARS:
        return (row if isinstance(row, str) else text)[:_MAX_ROW_CHARS] + "…"
    try:
        return json.loads(json.dumps(json.loads(text), allow_nan=False))
    except ValueError:
        return text


# Receives the error and the raw content of an unreadable row, which is then skipped.
OnBad = Callable[[BadRowError, object], None]
