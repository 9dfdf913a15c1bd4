"""Rows read in chunks, so that a file may be larger than memory.

A stream is read twice: :meth:`RowStream.scan` finds the columns, the number of rows and lines that are not
readable, before anything slow begins; :meth:`RowStream.chunks` gives the rows. Rows of a small file are kept
from the first reading. A file that changes between the two is an error.

It knows files and data sets of a hub; not references, formats or tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.data.arrow_rows import ArrowRows, rows_of
from deltaw.data.report import MAX_ROW_BYTES, BadRowError
from deltaw.data.row_files import (
    TYPED,
    OnBad,
    Opened,
    TableReader,
    delimiter_of,
    kind_of,
    object_lines,
    read_json,
    read_lines,
    reading,
)
from deltaw.data.rows import Row, Rows
from deltaw.errors import UserError

if TYPE_CHECKING:
    import datasets

# A chunk ends with the row that fills one of these. The tokenizer takes about forty times its bytes.
CHUNK_ROWS = 1024
CHUNK_BYTES = 2**20
# Rows of at most so many bytes are kept from the first reading.
KEPT_BYTES = 16 * 2**20
# Files of this many bytes at most count by their whole content, larger ones by parts of it.
SMALL_BYTES = 64 * 2**20
_PEEKED = 8192
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 2**10

# Number, row and bytes of it.
NumberedRow = tuple[int, Row, int]


class UnreadableRow(dict[str, object]):
    """A row that cannot be read: it has no columns, and ``error`` is the reason."""

    def __init__(self, error: BadRowError) -> None:
        super().__init__()
        self.error = error


class FilePart:
    """A file, compressed or not, whose rows may have ``max_bytes``.

    Attributes:
        name: for messages. bytes: its size; 0 where it is not known.
        position: bytes read so far. fills_nulls: as in :class:`Rows`.
    """

    def __init__(self, path: Path, name: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.name = name
        self._most = max_bytes
        self.position = 0
        self._path = path
        self._kind = str(kind_of(path))
        self.fills_nulls = self._kind in TYPED
        with reading(name):
            self.bytes = path.stat().st_size

    def known(self) -> tuple[list[str], int] | None:
        """Columns and number of rows, where they are known without reading, and no row is too long."""
        rows = self._arrow() if self._kind == "parquet" else None
        return None if rows is None or rows.rows is None else (rows.columns, rows.rows)

    def read(self, on_bad: OnBad | None) -> Iterator[NumberedRow]:
        """All rows."""
        if self.fills_nulls:
            taken = 0
            for row in self._arrow().read(on_bad):
                taken += row[2]
                self.position = min(self.bytes, taken)
                yield row
            return
        with reading(self.name), Opened(self._path) as opened:
            for row in self._read_text(opened, on_bad):
                self.position = opened.position
                yield row

    def _arrow(self) -> ArrowRows:
        return ArrowRows(self._path, self.name, self._kind, max_bytes=self._most)

    def _read_text(self, opened: Opened, on_bad: OnBad | None) -> Iterator[NumberedRow]:
        if self._kind == "jsonl":
            return read_lines(opened.file, self.name, on_bad, max_bytes=self._most)
        if self._kind == "json":
            return read_json(opened.file, self.name, max_bytes=self._most)
        table = self.table(opened, on_bad)
        return ((n, dict(zip(table.header, cells, strict=True)), sum(map(len, cells))) for n, cells in table)

    def table(self, opened: Opened, on_bad: OnBad | None) -> TableReader:
        """The cells of a file that is a table."""
        peeked: Any = opened.file  # each of the readers of :class:`Opened` can look ahead
        delimiter = "\t" if ".tsv" in self._path.name.lower() else delimiter_of(peeked.peek(_PEEKED))
        return TableReader(opened.file, self.name, delimiter, on_bad, max_bytes=self._most)

    def lines_of(self, numbers: set[int]) -> dict[int, int]:
        """Return the lines in which the rows of these numbers begin; empty for a file without lines."""
        found: dict[int, int] = {}
        if self._kind == "jsonl":
            return {number: number for number in numbers}
        with reading(self.name), Opened(self._path) as opened:
            starts: Iterator[tuple[int, int]] = iter(())
            if self._kind == "csv":
                table = self.table(opened, _told_before)
                starts = ((number, table.line) for number, _ in table)
            elif self._kind == "json":
                starts = object_lines(opened.file, self.name)
            for number, line in starts:
                if number in numbers:
                    found[number] = line
                if number >= max(numbers):
                    break
        return found

    def stamp(self) -> object:
        """Changes when the part is written to; cheap."""
        try:
            status = self._path.stat()
        except OSError as error:
            what = f"the file disappeared while it was read: {error.strerror or error}"
            raise UserError(what, where=self.name, hint="start again when it is there for good") from error
        return status.st_size, status.st_mtime_ns, status.st_ino

    def identity(self) -> object | None:
        """What tells this content from any other; None where nothing does."""
        with reading(self.name):
            return content_identity(self._path)


class HubPart:
    """A split of a data set that was loaded from a hub, with the members of :class:`FilePart`; its library keeps it
    on the disk, decoded."""

    def __init__(self, found: datasets.Dataset, name: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.name = name
        self._most = max_bytes
        self.bytes = self.position = 0
        self.fills_nulls = True
        self._found = found

    def known(self) -> tuple[list[str], int] | None:
        return list(self._found.column_names), len(self._found)

    def read(self, on_bad: OnBad | None) -> Iterator[NumberedRow]:
        names = list(self._found.column_names)
        stored = self._found.with_format("arrow")
        begin = 0
        for start in range(0, len(self._found), 256):
            for batch in stored[start : start + 256].to_batches():

                def made(first: int, stop: int, begin: int = begin) -> list[Row]:
                    columns = self._found[begin + first : begin + stop]
                    values = zip(*(columns[n] for n in names), strict=True)
                    return [dict(zip(names, row, strict=True)) for row in values]

                yield from rows_of(batch, made, begin + 1, self.name, on_bad, max_bytes=self._most)
                begin += batch.num_rows

    def stamp(self) -> object:
        return len(self._found)

    def identity(self) -> object | None:
        files = [Path(file["filename"]) for file in self._found.cache_files]
        return [self.name, len(self._found), *map(content_identity, files)] if files else None


Part = FilePart | HubPart


class RowStream:
    """The rows of one source, in chunks.

    Args:
        name: the reference, as given. parts: its files.
        on_bad: told of lines that cannot be read, in the first reading; they are skipped then.
        max_bytes: the most characters of all columns' names together.

    Attributes:
        columns: names of all columns, in the order in which they first appear; known after :meth:`scan`.
        rows: how many rows there are, without the skipped ones. bad: how many were skipped.
        files: The number of files.
    """

    def __init__(
        self, name: str, parts: Sequence[Part], *, on_bad: OnBad | None = None, max_bytes: int = MAX_ROW_BYTES
    ) -> None:
        self.name = name
        self.columns: list[str] = []
        self.rows = self.bad = 0
        self.files = len(parts)
        self.fills_nulls = any(part.fills_nulls for part in parts)
        self._parts = list(parts)
        self._most = max_bytes
        self._on_bad = on_bad
        self._first_bad: UserError | None = None
        self._stamps = [part.stamp() for part in parts]
        self._kept: list[list[NumberedRow]] | None = []

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(part.bytes for part in self._parts)

    @property
    def position(self) -> int:
        """Bytes read so far in the present reading."""
        return sum(part.position for part in self._parts)

    def identity(self) -> list[object] | None:
        """What tells this content from any other; None where something does not say."""
        found = [part.identity() for part in self._parts]
        return None if any(one is None for one in found) else found

    def scan(self, on_rows: Callable[[int, int], object] = lambda rows, position: None) -> None:
        """Read everything once: columns, number of rows, errors.

        Args:
            on_rows: told now and then how many rows and bytes were read so far.

        Raises:
            UserError: a file cannot be read, or there is no row.
        """
        columns: dict[str, None] = {}
        taken = named = 0
        for part in self._parts:
            known = part.known() if self._on_bad is None else None  # one that is too long is not counted
            if known is not None:
                columns.update(dict.fromkeys(known[0] if known[1] else ()))
                self.rows += known[1]
                self._kept = None
                continue
            kept: list[NumberedRow] = []
            for number, row, size in part.read(None if self._on_bad is None else self._skipped):
                self.rows += 1
                if not columns.keys() >= row.keys():
                    named += sum(len(name) for name in row.keys() - columns.keys())
                    if named > self._most:
                        what = "the names of the rows' columns, taken together, are longer than a row may be"
                        hint = "rows have the same columns; raise data.max_row_bytes if there are that many"
                        raise UserError(what, where=f"{part.name}, row {number}", hint=hint)
                    columns.update(dict.fromkeys(row))
                if self._kept is not None:
                    taken += size
                    kept.append((number, row, size))
                    if taken > KEPT_BYTES:
                        self._kept, kept = None, []
                if self.rows % CHUNK_ROWS == 0:
                    on_rows(self.rows, self.position)
            if self._kept is not None:
                self._kept.append(kept)
        if not self.rows:
            raise empty_file(self.name, self._first_bad, self.bytes)
        self.columns = list(columns)

    def chunks(self, *, unreadable: bool = False) -> Iterator[Rows]:
        """All rows in their order, some at a time.

        Args:
            unreadable: Include each row that cannot be read, as an :class:`UnreadableRow`.

        Raises:
            UserError: a file cannot be read, or is not what it was when the stream was opened.
        """
        count = 0
        for part in self._parts:
            part.position = 0
        for chunk in self._chunks(unreadable):
            count += sum(not isinstance(row, UnreadableRow) for _, row in chunk)
            yield chunk
        stamps = [part.stamp() for part in self._parts]
        changed = [p for p, a, b in zip(self._parts, self._stamps, stamps, strict=True) if a != b]
        if changed or count != self.rows:
            what, hint = "the file changed while it was read", "start again when nothing writes to it"
            raise UserError(what, where=changed[0].name if changed else self.name, hint=hint)

    def _chunks(self, unreadable: bool) -> Iterator[Rows]:
        passed_over = None if self._on_bad is None else _told_before
        for place, part in enumerate(self._parts):
            source = iter(part.read(passed_over) if self._kept is None else self._kept[place])
            if unreadable:
                source = _with_unreadable(part)
            while found := list(_chunk_of(source)):
                numbers, rows, _ = zip(*found, strict=True)
                yield Rows(self.name, [(part.name, numbers, rows)], self.columns, fills_nulls=self.fills_nulls)

    def _skipped(self, error: BadRowError, row: object) -> None:
        self.bad += 1
        self._first_bad = self._first_bad or error
        if self._on_bad is not None:
            self._on_bad(error, row)


def _chunk_of(rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    """The next rows, until they fill a chunk."""
    taken = 0
    for count, row in enumerate(rows, start=1):
        yield row
        taken += row[2]
        if count == CHUNK_ROWS or taken >= CHUNK_BYTES:
            return


def _with_unreadable(part: Part) -> Iterator[NumberedRow]:
    """All rows of a part; rows that cannot be read have the number that the error names, or the next one."""
    failed: list[BadRowError] = []
    last = 0
    for row in chain(part.read(lambda error, _: failed.append(error)), [None]):
        while failed:
            error = failed.pop(0)
            named = re.search(r"(?:row|line) (\d+)$", error.where or "")
            last = int(named[1]) if named else last + 1
            yield last, UnreadableRow(error), 0
        if row is not None:
            last = row[0]
            yield row


def _told_before(error: BadRowError, row: object) -> None:
    """The first reading told of it."""


def content_identity(path: Path) -> list[object]:
    """What tells a file's content from any other: a hash of all of it, or of a large file its path, size,
    times of change, and a hash of parts spread over it."""
    status = path.stat()
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if status.st_size <= SMALL_BYTES:
            while block := file.read(2**20):
                digest.update(block)
            return [digest.hexdigest()]
        sample(file, status.st_size, digest)
    # The time of the last change of status cannot be set back, as that of content can.
    times = [status.st_mtime_ns, status.st_ctime_ns if os.name == "posix" else 0]
    return [str(path.resolve()), status.st_size, *times, digest.hexdigest()]


def sample(file: Any, size: int, digest: Any) -> None:
    """Feed parts of a file of ``size`` bytes, spread evenly from its first to its last byte, to a hash."""
    last = max(0, size - _SAMPLE_BYTES)
    for start in (*range(0, last + 1, max(1, last // (_SAMPLES - 1))), last):
        file.seek(start)
        digest.update(file.read(_SAMPLE_BYTES))


def empty_file(name: str, bad: UserError | None = None, size: int = 0) -> UserError:
    """Return the error for a file without a usable row.

    Args:
        bad: Error of the first row. size: Bytes of the file.
    """
    if bad is not None:
        return UserError(f"no row can be read; the first error: {bad.what}", where=bad.where, hint=bad.hint)
    what = "it contains blank lines, a header or an empty list only" if size else "it is empty"
    return UserError(f"the file has no row: {what}", where=name, hint="name the file that has the rows")
