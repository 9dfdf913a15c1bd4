"""Reader of CSV and TSV tables."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from typing import IO

from deltaw.data.bad_rows import BadRowError, OnBad, too_long_error
from deltaw.data.json_lines import not_utf8
from deltaw.errors import UserError
from deltaw.settings.data import MAX_ROW_BYTES

# Maximum number of columns of a table.
MAX_COLUMNS = 100_000
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def delimiter_of(beginning: bytes) -> str:
    """Return the delimiter of a table not named .tsv: a semicolon or tab if both of the first two lines contain it and
    the first has no comma, else a comma.
    """
    lines = beginning.splitlines()[:2]
    if not lines or b"," in lines[0]:
        return ","
    return next((mark for mark in (";", "\t") if all(mark.encode() in line for line in lines)), ",")


class TableReader:
    """Reader of the rows of a table.

    Every cell is an unchanged string, including "1", "NA" and "". A first row that contains only numbers is not a
    header, in which case the columns are named column_1, column_2, and so on.

    Args:
        file: Content of the table.
        name: File name, for messages.
        delimiter: Delimiter of the cells.
        on_bad: Receives rows with a wrong number of cells, which are skipped.
        max_bytes: Maximum number of characters of a row. A longer row always raises an error, because the start of the
            next row is unknown without reading it.

    Attributes:
        header: Column names. Empty for an empty file.
        has_header: True if the file contains the column names.

    Raises:
        UserError: if the table cannot be read, also during iteration. The message names row and line.
    """

    def __init__(
        self, file: IO[bytes], name: str, delimiter: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES
    ) -> None:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self._name = name
        self._delimiter = delimiter
        self._on_bad = on_bad
        self._text = _TextLines(file, name, max_bytes)
        self._reader = csv.reader(self._text, delimiter=delimiter, strict=True)
        self.has_header = True
        self.header: list[str] = []
        self._first: list[str] | None = None
        self._count = 0
        while (header := self._next()) == []:
            continue  # blank lines before the header
        if header is None:
            return
        if len(header) > 1 and all(map(_is_number, header)):
            self.has_header = False
            self._first = header
            header = [f"column_{number}" for number in range(1, len(header) + 1)]
        self.header = header
        if len(header) > MAX_COLUMNS:
            message = f"the table has {len(header):,} columns, and at most {MAX_COLUMNS:,} are supported"
            hint = "remove columns, or join cells into texts"
            raise UserError(message, location=f"{name}, line 1", hint=hint)
        if len(set(header)) < len(header):
            repeated = next(column for column, count in Counter(header).items() if count > 1)
            raise UserError(f"the column '{repeated}' appears twice", location=f"{name}, line 1", hint="rename one")

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number, from 1, and the cells of each row."""
        if self._first is not None:
            self._count += 1
            yield self._count, self._first
        while (cells := self._next()) is not None:
            if not cells:
                continue
            self._count += 1
            if len(cells) != len(self.header):
                first = "header" if self.has_header else "first row"
                message = f"row {self._count} has {len(cells)} cells, the {first} has {len(self.header)}"
                location = f"{self._name}, row {self._count} (ends in line {self._reader.line_num})"
                hint = f"quote cells that contain a {_DELIMITERS[self._delimiter]}"
                error = BadRowError(message, reason="another number of cells", location=location, hint=hint)
                if self._on_bad is None:
                    raise error
                self._on_bad(error, cells)
                continue
            yield self._count, cells

    @property
    def line(self) -> int:
        """Return the first line of the current row."""
        return self._text.first

    def _next(self) -> list[str] | None:
        """Return the cells of the next row, or None at the end."""
        self._text.start_row()
        location = f"{self._name}, row {self._count + 1}"
        try:
            return next(self._reader, None)
        except csv.Error as error:
            message = f"the table cannot be read: {error}"
            hint = 'a quote inside a quoted cell is written twice: ""'
            raise UserError(message, location=f"{location} (line {self._reader.line_num})", hint=hint) from error
        except _LongRow:
            location += f" (lines {self._text.first} to {self._text.number})"
            hint = "a quote that is never closed joins all lines that follow it"
            too_long = too_long_error(f"row {self._count + 1}", self._text.max_bytes, location=location, hint=hint)
            raise too_long.of_file() from None


class _LongRow(Exception):
    """A row of a table exceeds the size limit."""


class _TextLines:
    """Lines of a file as text, with their line endings, which may be a carriage return.

    Attributes:
        number: Number of lines read so far.
        first: First line of the current row.
    """

    def __init__(self, file: IO[bytes], name: str, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.number = 0
        self.first = 1
        self._text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        self._name = name
        self._remaining = max_bytes

    def start_row(self) -> None:
        self.first = self.number + 1
        self._remaining = self.max_bytes

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = self._text.readline(self._remaining + 1)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._name, self.number + 1).of_file() from error
        if not line:
            raise StopIteration
        self.number += 1
        self._remaining -= len(line)
        if self._remaining < 0:
            raise _LongRow
        return line


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
