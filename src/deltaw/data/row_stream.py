"""Chunked reading of rows from sources that may exceed memory.

A stream is read twice. :meth:`RowStream.scan` determines columns, number of rows and unreadable lines.
:meth:`RowStream.chunks` yields the rows. Rows of small files are buffered by the scan. A file that changes in between
raises an error.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.data.arrow_rows import parquet_metadata, read_arrow, rows_of
from deltaw.data.bad_rows import BadRowError, OnBad
from deltaw.data.compressed_files import DecompressedFile
from deltaw.data.json_lines import read_lines
from deltaw.data.json_list import object_lines, read_json
from deltaw.data.row_files import TYPED, kind_of, reading
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.tables import TableReader, delimiter_of
from deltaw.errors import UserError
from deltaw.settings.data import MAX_ROW_BYTES

if TYPE_CHECKING:
    import datasets
    import pyarrow

# Size limits of a chunk. The tokenizer needs about 40 times CHUNK_BYTES of memory.
CHUNK_ROWS = 1024
CHUNK_BYTES = 2**20
# Maximum number of bytes buffered by the scan.
MEMORY_BYTES = 16 * 2**20
# Maximum size of files that are identified by a hash of their entire content.
SMALL_BYTES = 64 * 2**20
_PEEKED = 8192
_SAMPLES = 64
_SAMPLE_BYTES = 64 * 2**10

# Row number, row, and size in bytes.
NumberedRow = tuple[int, Row, int]


class UnreadableRow(dict[str, object]):
    """Placeholder of a row that cannot be read.

    Attributes:
        error: Reason.
    """

    def __init__(self, error: BadRowError) -> None:
        super().__init__()
        self.error = error


class FilePart:
    """File of a source, possibly compressed, with rows of at most ``max_bytes``.

    Attributes:
        name: Name for messages.
        bytes: File size, or 0 if unknown.
        position: Number of bytes read so far.
        fills_nulls: See :class:`NumberedRows`.
    """

    def __init__(self, path: Path, name: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.name = name
        self._max_bytes = max_bytes
        self.position = 0
        self._path = path
        self._kind = str(kind_of(path))
        self.fills_nulls = self._kind in TYPED
        with reading(name):
            self.bytes = path.stat().st_size

    def metadata(self) -> tuple[list[str], int] | None:
        """Return columns and number of rows if they are available without reading the rows, else None."""
        return parquet_metadata(self._path, self.name) if self._kind == "parquet" else None

    def read(self, on_bad: OnBad | None) -> Iterator[NumberedRow]:
        """Yield all rows."""
        if self.fills_nulls:
            bytes_read = 0
            for row in read_arrow(self._path, self.name, self._kind, on_bad, max_bytes=self._max_bytes):
                bytes_read += row[2]
                self.position = min(self.bytes, bytes_read)
                yield row
            return
        with reading(self.name), DecompressedFile(self._path) as opened:
            for row in self._read_text(opened, on_bad):
                self.position = opened.position
                yield row

    def _read_text(self, opened: DecompressedFile, on_bad: OnBad | None) -> Iterator[NumberedRow]:
        if self._kind == "jsonl":
            return read_lines(opened.file, self.name, on_bad, max_bytes=self._max_bytes)
        if self._kind == "json":
            return read_json(opened.file, self.name, max_bytes=self._max_bytes)
        table = self.table(opened, on_bad)
        return ((n, dict(zip(table.header, cells, strict=True)), sum(map(len, cells))) for n, cells in table)

    def table(self, opened: DecompressedFile, on_bad: OnBad | None) -> TableReader:
        """Return a reader of a table file."""
        file: Any = opened.file  # all readers of :class:`DecompressedFile` have peek()
        delimiter = "\t" if ".tsv" in self._path.name.lower() else delimiter_of(file.peek(_PEEKED))
        return TableReader(opened.file, self.name, delimiter, on_bad, max_bytes=self._max_bytes)

    def lines_of(self, numbers: set[int]) -> dict[int, int]:
        """Return the first line of each row with one of these numbers. Empty for files without lines."""
        line_of_row: dict[int, int] = {}
        if self._kind == "jsonl":
            return {number: number for number in numbers}
        with reading(self.name), DecompressedFile(self._path) as opened:
            starts: Iterator[tuple[int, int]] = iter(())
            if self._kind == "csv":
                table = self.table(opened, _ignore_bad_row)
                starts = ((number, table.line) for number, _ in table)
            elif self._kind == "json":
                starts = object_lines(opened.file, self.name)
            for number, line in starts:
                if number in numbers:
                    line_of_row[number] = line
                if number >= max(numbers):
                    break
        return line_of_row

    def stamp(self) -> object:
        """Return a value that changes when the file is written."""
        try:
            status = self._path.stat()
        except OSError as error:
            message = f"the file disappeared while it was read: {error.strerror or error}"
            raise UserError(message, location=self.name, hint="start again when the file is available") from error
        return status.st_size, status.st_mtime_ns, status.st_ino

    def identity(self) -> object | None:
        """Return a value that identifies the content, or None."""
        with reading(self.name):
            return content_identity(self._path)


class HubPart:
    """Split of a hub data set, with the interface of :class:`FilePart`. The datasets library stores it on disk."""

    def __init__(self, dataset: datasets.Dataset, name: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        self.name = name
        self._max_bytes = max_bytes
        self.bytes = self.position = 0
        self.fills_nulls = True
        self._dataset = dataset.with_format("arrow")  # does not decode images, as in HubRows

    def metadata(self) -> tuple[list[str], int] | None:
        return list(self._dataset.column_names), len(self._dataset)

    def read(self, on_bad: OnBad | None) -> Iterator[NumberedRow]:
        batch_start = 0
        for start in range(0, len(self._dataset), 256):
            for batch in self._dataset[start : start + 256].to_batches():

                def to_rows(first: int, stop: int, batch: pyarrow.RecordBatch = batch) -> list[Row]:
                    return batch.slice(first, stop - first).to_pylist()

                yield from rows_of(batch, to_rows, batch_start + 1, self.name, on_bad, max_bytes=self._max_bytes)
                batch_start += batch.num_rows

    def stamp(self) -> object:
        return len(self._dataset)

    def identity(self) -> object | None:
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        return [self.name, len(self._dataset), *map(content_identity, files)] if files else None


class HubRows(Sequence[Row]):
    """Rows of a hub data set with encoded images, because the library would open any path or URL in a row."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        is_slice = isinstance(index, slice)
        rows = self._dataset[index if is_slice else [index]].to_pylist()
        return rows if is_slice else rows[0]


Part = FilePart | HubPart


class RowStream:
    """Rows of one source in chunks.

    Args:
        name: The reference that the user gave.
        parts: Files of the source.
        on_bad: Receives unreadable rows during the scan, which are skipped. Without it they raise an error.
        max_bytes: Maximum total length of all column names.

    Attributes:
        columns: Names of all columns in order of first appearance, available after :meth:`scan`.
        rows: Number of readable rows.
        bad: Number of skipped rows.
        files: Number of files.
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
        self._max_bytes = max_bytes
        self._on_bad = on_bad
        self._first_bad: UserError | None = None
        self._stamps = [part.stamp() for part in parts]
        self._buffered: list[list[NumberedRow]] | None = []

    @property
    def bytes(self) -> int:
        """Return the total size of all files."""
        return sum(part.bytes for part in self._parts)

    @property
    def position(self) -> int:
        """Return the number of bytes read so far in the current pass."""
        return sum(part.position for part in self._parts)

    def identity(self) -> list[object] | None:
        """Return a value that identifies the content, or None if a part has no identity."""
        identities = [part.identity() for part in self._parts]
        return None if any(identity is None for identity in identities) else identities

    def scan(self, on_rows: Callable[[int, int], object] = lambda rows, position: None) -> None:
        """Read all rows once to determine columns, number of rows and errors.

        Args:
            on_rows: Called regularly with the number of rows and bytes read so far.

        Raises:
            UserError: if a file cannot be read, or the source has no row.
        """
        columns: dict[str, None] = {}
        buffered_bytes = name_length = 0
        for part in self._parts:
            metadata = part.metadata() if self._on_bad is None else None  # the metadata counts rows that are too long
            if metadata is not None:
                columns.update(dict.fromkeys(metadata[0] if metadata[1] else ()))
                self.rows += metadata[1]
                self._buffered = None
                continue
            part_rows: list[NumberedRow] = []
            for number, row, size in part.read(None if self._on_bad is None else self._skipped):
                self.rows += 1
                if not columns.keys() >= row.keys():
                    name_length += sum(len(name) for name in row.keys() - columns.keys())
                    if name_length > self._max_bytes:
                        message = "the column names of the rows have a total length above data.max_row_bytes"
                        hint = "use the same columns in all rows, or raise data.max_row_bytes"
                        raise UserError(message, location=f"{part.name}, row {number}", hint=hint)
                    columns.update(dict.fromkeys(row))
                if self._buffered is not None:
                    buffered_bytes += size
                    part_rows.append((number, row, size))
                    if buffered_bytes > MEMORY_BYTES:
                        self._buffered = None
                        part_rows = []
                if self.rows % CHUNK_ROWS == 0:
                    on_rows(self.rows, self.position)
            if self._buffered is not None:
                self._buffered.append(part_rows)
        if not self.rows:
            raise empty_file(self.name, self._first_bad, self.bytes)
        self.columns = list(columns)

    def head(self, count: int) -> Iterator[NumberedRow]:
        """Yield the first rows without a scan. Unreadable rows are :class:`UnreadableRow`."""
        return islice(chain.from_iterable(map(_with_unreadable, self._parts)), count)

    def chunks(self, *, unreadable: bool = False) -> Iterator[NumberedRows]:
        """Yield all rows in order, in chunks.

        Args:
            unreadable: Include unreadable rows as :class:`UnreadableRow`.

        Raises:
            UserError: if a file cannot be read, or changed after the stream was opened.
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
            message = "the file changed while it was read"
            hint = "start again when no process writes to it"
            raise UserError(message, location=changed[0].name if changed else self.name, hint=hint)

    def _chunks(self, unreadable: bool) -> Iterator[NumberedRows]:
        on_bad = None if self._on_bad is None else _ignore_bad_row
        for index, part in enumerate(self._parts):
            source = iter(part.read(on_bad) if self._buffered is None else self._buffered[index])
            if unreadable:
                source = _with_unreadable(part)
            while chunk := list(_chunk_of(source)):
                numbers, rows, _ = zip(*chunk, strict=True)
                yield NumberedRows(self.name, [(part.name, numbers, rows)], self.columns, fills_nulls=self.fills_nulls)

    def _skipped(self, error: BadRowError, row: object) -> None:
        self.bad += 1
        self._first_bad = self._first_bad or error
        if self._on_bad is not None:
            self._on_bad(error, row)


def _chunk_of(rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
    """Yield the rows of the next chunk."""
    size = 0
    for count, row in enumerate(rows, start=1):
        yield row
        size += row[2]
        if count == CHUNK_ROWS or size >= CHUNK_BYTES:
            return


def _with_unreadable(part: Part) -> Iterator[NumberedRow]:
    """Yield all rows of a part. An unreadable row has the number in its error's location, or the next number."""
    failed: list[BadRowError] = []
    last = 0
    for row in chain(part.read(lambda error, _: failed.append(error)), [None]):
        while failed:
            error = failed.pop(0)
            match = re.search(r"(?:row|line) (\d+)$", error.location or "")
            last = int(match[1]) if match else last + 1
            yield last, UnreadableRow(error), 0
        if row is not None:
            last = row[0]
            yield row


def _ignore_bad_row(error: BadRowError, row: object) -> None:
    """Ignore a bad row, which the scan reported."""


def content_identity(path: Path) -> list[object]:
    """Return a value that identifies the content of a file: a hash of the content, or for large files the path, size,
    times and a hash of samples.
    """
    status = path.stat()
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if status.st_size <= SMALL_BYTES:
            while block := file.read(2**20):
                digest.update(block)
            return [digest.hexdigest()]
        sample(file, status.st_size, digest)
    # Unlike the modification time, the status change time cannot be set by users.
    times = [status.st_mtime_ns, status.st_ctime_ns if os.name == "posix" else 0]
    return [str(path.resolve()), status.st_size, *times, digest.hexdigest()]


def sample(file: Any, size: int, digest: Any) -> None:
    """Hash evenly spaced parts of a file of ``size`` bytes, including its first and last byte."""
    last = max(0, size - _SAMPLE_BYTES)
    for start in (*range(0, last + 1, max(1, last // (_SAMPLES - 1))), last):
        file.seek(start)
        digest.update(file.read(_SAMPLE_BYTES))


def empty_file(name: str, bad: UserError | None = None, size: int = 0) -> UserError:
    """Return the error for a file without a usable row.

    Args:
        bad: Error of the first unreadable row.
        size: File size in bytes.
    """
    if bad is not None:
        return UserError(f"no row can be read; the first error: {bad.message}", location=bad.location, hint=bad.hint)
    reason = "it contains only blank lines, a header or an empty list" if size else "it is empty"
    return UserError(f"the file has no row: {reason}", location=name, hint="name the file that has the rows")
