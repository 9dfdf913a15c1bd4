"""Rows of Parquet and Arrow files and tables, in batches of limited memory.

The memory of a row is computed from its columns before values are converted to objects, because rows may share a stored
value.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from deltaw.data.report import MAX_ROW_BYTES, too_long_error
from deltaw.data.row_files import OnBad, reading
from deltaw.data.rows import Row
from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet


# Decoded size of Parquet and Arrow files, computed from their headers before decoding.
#
# A file of a kilobyte can decode to gigabytes, for example through compression, dictionaries or run-length encoding.
# The sizes are from the same page headers that the decoder uses, because a Parquet footer may contain other values.
#
# Formats: https://github.com/apache/parquet-format (``PageHeader`` of parquet.thrift, in Thrift's compact
# protocol), https://arrow.apache.org/docs/format/Columnar.html (``Message.fbs``, in flatbuffers).


# A unit that is decoded at once may take MIN_DECODED_BYTES, or MAX_EXPANSION times its size in the file.
MIN_DECODED_BYTES, MAX_EXPANSION = 256 * 2**20, 256
# Target size of a batch.
_BATCH_BYTES = 64 * 2**20
# Maximum number of rows per batch.
BATCH_ROWS = 1024
# Maximum size of a page header, as in Arrow's reader.
_LONGEST_HEADER = 16 * 2**20
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
# Page types. For both versions of data pages, the number of the field that describes them, and the number of the
# encoding in that field.
_DICTIONARY_PAGE, _DATA_PAGES = 2, {0: (5, 2), 3: (8, 4)}
# Arrow's names of Parquet's compression codecs. Empty for uncompressed pages.
_CODECS = {"UNCOMPRESSED": "", "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
_LARGE_DICTIONARY = 2**22
# Encodings that repeat other values: dictionary (two versions), and delta to the preceding value.
_DICTIONARY, _DELTA = (2, 8), 7


def check_decoded(decoded: int, stored: int, location: str, hint: str) -> None:
    """Raise a UserError if ``decoded`` bytes in memory are out of proportion to ``stored`` bytes in the file."""
    if decoded > max(MIN_DECODED_BYTES, MAX_EXPANSION * stored):
        raise UserError(f"{stored:,} bytes of the file become {decoded:,} in memory", location=location, hint=hint)


# Parquet


@dataclass
class _Column:
    """Sizes of the pages of one column in a row group.

    Attributes:
        page: Size of the largest page in bytes.
        dictionary: Size of the dictionary in bytes.
        entry: Size of the longest text in the dictionary in bytes.
        total: Size of all pages in bytes.
        values: Number of values.
        densest: Maximum over pages of the average value size in bytes.
        repeating: Number of values that repeat others.
        longest: Maximum size of such a value in bytes.
    """

    page: int = 0
    dictionary: int = 0
    entry: int = 0
    total: int = 0
    values: int = 0
    densest: float = 0.0
    repeating: int = 0
    longest: int = 0


def check_group(parquet: pyarrow.parquet.ParquetFile, number: int, file: IO[bytes], name: str) -> tuple[int, list[int]]:
    """Check the pages of a row group.

    Args:
        file: The same file, opened for reading.
        name: File name, for messages.

    Returns:
        The number of rows per batch, and the indices of the columns to read as dictionaries because their values are
        repeated too often.

    Raises:
        UserError: if the group is damaged, or needs memory out of proportion to its size.
    """
    group = parquet.metadata.row_group(number)
    size = file.seek(0, 2)
    location = f"{name}, group {number + 1} of rows"
    decoded = stored = 0
    bytes_per_row = 1.0
    dictionaries = []
    for index in range(group.num_columns):
        chunk, column_schema = group.column(index), parquet.schema.column(index)
        stored += chunk.total_compressed_size
        try:
            pages = _pages(chunk, file, size)
        except (LookupError, ValueError, TypeError) as error:
            message = f"a page header of the column '{chunk.path_in_schema}' cannot be read: {error}"
            raise UserError(message, location=location, hint="copy the file again") from error
        width = _WIDTHS.get(chunk.physical_type, max(0, column_schema.length))
        is_text, is_list = chunk.physical_type == "BYTE_ARRAY", column_schema.max_repetition_level > 0
        decoded += pages.page + pages.dictionary
        repeated = pages.repeating * pages.longest if is_text else 0
        if is_list:  # one row may have all values
            if repeated > _BATCH_BYTES and pages.longest == pages.entry:
                dictionaries.append(index)
                repeated = 0
            decoded += pages.values * (width + 8) + repeated + (pages.total if is_text else 0)
            bytes_per_row += pages.total / max(1, group.num_rows)
        elif is_text:
            decoded += 2 * pages.page + pages.longest
            bytes_per_row += pages.densest + pages.longest
        else:
            bytes_per_row += width
    hint = "if it is correct, write it again with smaller row groups (row_group_size)"
    check_decoded(decoded, min(stored, size), location, hint)
    return max(1, min(BATCH_ROWS, int(_BATCH_BYTES / bytes_per_row))), dictionaries


def _pages(chunk: pyarrow.parquet.ColumnChunkMetaData, file: IO[bytes], size: int) -> _Column:
    """Read the page headers of a column.

    Raises:
        ValueError, LookupError, TypeError: if they cannot be read.
    """
    column = _Column()
    position = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < position:
        position = chunk.dictionary_page_offset
    end = position + chunk.total_compressed_size
    if not 0 <= position <= end <= size:
        raise ValueError("it is outside of the file")
    while position < end and column.values < chunk.num_values:
        header, length = _header(file, position)
        decoded, stored = int(header[2]), int(header[3])  # type: ignore[call-overload]
        if decoded < 0 or stored < 0:
            raise ValueError("a page has a negative size")
        page_start, position = position + length, position + length + stored
        if header[1] == _DICTIONARY_PAGE:
            column.dictionary = max(column.dictionary, decoded)
            if chunk.physical_type == "BYTE_ARRAY":
                file.seek(page_start)
                page = file.read(min(stored, _LARGE_DICTIONARY))
                column.entry = max(column.entry, _longest_entry(page, chunk.compression, decoded))
        elif header[1] in _DATA_PAGES:
            number, encoding_at = _DATA_PAGES[header[1]]
            fields: dict[int, int] = header[number]  # type: ignore[assignment]
            values, encoding = int(fields[1]), fields[encoding_at]
            column.page = max(column.page, decoded)
            column.total += decoded
            column.values += max(0, values)
            column.densest = max(column.densest, decoded / max(1, values))
            if encoding in _DICTIONARY or encoding == _DELTA:
                column.repeating += max(0, values)
                column.longest = max(column.longest, column.entry if encoding in _DICTIONARY else decoded)
    return column


def _longest_entry(page: bytes, compression: str, decoded: int) -> int:
    """Return the size in bytes of the longest text in a dictionary page.

    Return the total size ``decoded`` if the dictionary is large or its codec is unknown.
    """
    import pyarrow

    codec = _CODECS.get(compression)
    if decoded > _LARGE_DICTIONARY or codec is None:
        return decoded
    try:
        texts = pyarrow.Codec(codec).decompress(page, decoded).to_pybytes() if codec else page
    except pyarrow.ArrowException:
        return decoded
    longest = position = 0
    while position + 4 <= len(texts):
        length = int.from_bytes(texts[position : position + 4], "little")
        longest = max(longest, length)
        position += 4 + length
    return longest


def _header(file: IO[bytes], position: int) -> tuple[dict[int, object], int]:
    """Return the fields of the page header at ``position``, by number, and its length."""
    length = 2**10
    while True:
        file.seek(position)
        data = file.read(length)
        thrift = _Thrift(data)
        try:
            return thrift.fields(0), thrift.at
        except IndexError:
            if len(data) < length or length > _LONGEST_HEADER:
                raise
            length *= 8


# Sizes in bytes of Thrift's fixed-size types: true, false, byte and double.
_FIXED_BYTES = {1: 0, 2: 0, 3: 1, 7: 8}


class _Thrift:
    """Reader of structs in Thrift's compact protocol. Returns integers and structs, and skips other values."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self._data = data

    def fields(self, depth: int) -> dict[int, object]:
        """Return the fields of a struct by number."""
        values: dict[int, object] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            values[number] = self._value(head & 15, depth)
        return values

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 70:
                raise ValueError("a number is too long")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _pass_over(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError("the header is truncated")

    def _value(self, kind: int, depth: int) -> object:
        if depth > 16:
            raise ValueError("a header is nested too deeply")
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.fields(depth + 1)
        if kind in (9, 10):
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                if head & 15 in (1, 2):
                    self._pass_over(1)
                else:
                    self._value(head & 15, depth + 1)
        elif kind == 8:
            self._pass_over(self._varint())
        elif kind in _FIXED_BYTES:
            self._pass_over(_FIXED_BYTES[kind])
        else:
            raise ValueError(f"a header has a field of the type {kind}")
        return None


# Arrow

_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2


def decoded_sizes(messages: pyarrow.ipc.MessageReader, name: str) -> Iterator[None]:
    """Check the messages of an Arrow stream, advancing one record batch and its preceding dictionaries per step.

    Raises:
        UserError: if decompressing the next message needs memory out of proportion to its size.
    """
    dictionary_bytes = stored = 0
    number = 0
    for message in messages:
        kind, batch = _batch_of(message.metadata)
        if batch is None:
            continue
        number += 1
        body = memoryview(message.body)
        # A compressed buffer starts with its decompressed size, or -1 if it is not compressed.
        decoded = sum(max(0, _read("<q", body, offset)) for offset, length in _compressed(batch) if length)
        stored += len(body)
        hint = "if it is correct, write it again in smaller batches or uncompressed"
        check_decoded(decoded + dictionary_bytes, stored, f"{name}, message {number}", hint)
        if kind == _DICTIONARY_BATCH:
            dictionary_bytes += decoded
        else:
            yield


@dataclass(frozen=True)
class _Table:
    """Flatbuffer table at offset ``at`` of ``data``."""

    data: memoryview
    at: int

    def field(self, number: int) -> int:
        """Return the offset of a field's value, or 0 if the table does not have the field."""
        vtable = self.at - _read("<i", self.data, self.at)
        entry = 4 + 2 * number
        if entry >= _read("<H", self.data, vtable):
            return 0
        offset = _read("<H", self.data, vtable + entry)
        return self.at + offset if offset else 0

    def table(self, number: int) -> _Table | None:
        """Return the table in a field, or None."""
        at = self.field(number)
        return _Table(self.data, at + _read("<I", self.data, at)) if at else None


def _read(form: str, data: memoryview, at: int) -> int:
    try:
        return int(struct.unpack_from(form, data, at)[0])
    except struct.error as error:
        raise ValueError(str(error)) from error


def _batch_of(metadata: pyarrow.Buffer) -> tuple[int, _Table | None]:
    """Return the type of a message, and its record batch (for a dictionary, the batch of its values)."""
    data = memoryview(metadata).cast("B")
    message = _Table(data, _read("<I", data, 0))
    at = message.field(1)
    kind = data[at] if at else 0
    header = message.table(2) if kind in (_RECORD_BATCH, _DICTIONARY_BATCH) else None
    return kind, header.table(1) if header is not None and kind == _DICTIONARY_BATCH else header


def _compressed(batch: _Table) -> Iterator[tuple[int, int]]:
    """Yield offset and length of each compressed buffer of a record batch."""
    at = batch.field(2)
    if not at or not batch.field(3):
        return
    at += _read("<I", batch.data, at)
    for number in range(_read("<I", batch.data, at)):
        place = at + 4 + 16 * number
        yield _read("<q", batch.data, place), _read("<q", batch.data, place + 8)


# Approximate size of the rows that are converted to objects at once.
_PART_BYTES = 2**20
# Number of list elements whose sizes are computed at once.
_ELEMENTS = 2**22
# Overhead of a list element, which counts for nulls as well, because they need memory as objects.
_ELEMENT_BYTES = 8


@contextlib.contextmanager
def reading_arrow(name: str, kind: str) -> Iterator[None]:
    """Convert exceptions from damaged files to UserErrors."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError) as error:
        # Other errors are from invalid UTF-8, offsets outside of buffers, and times out of Python's range.
        hint = "copy the file again, and check that its suffix matches its content"
        file_type = "Parquet file" if kind == "parquet" else "Arrow file"
        raise UserError(f"the {file_type} cannot be read: {error}", location=name, hint=hint) from error


class ArrowRows:
    """Rows of a Parquet or Arrow file.

    Args:
        name: File name, for messages.
        kind: "parquet" or "arrow".
        max_bytes: Maximum size of a row in bytes.

    Attributes:
        columns: Column names.
        rows: Number of rows, or None if it is unknown before reading.
    """

    def __init__(self, path: Path, name: str, kind: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet

        self._path, self._name, self._kind, self._max_bytes = path, name, kind, max_bytes
        self.rows: int | None = None
        with reading(name), reading_arrow(name, kind):
            if kind == "parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path)
                self.columns = list(self._parquet.schema_arrow.names)
                self.rows = self._parquet.metadata.num_rows
                return
            file = pyarrow.memory_map(str(path))
            # A file is a stream with an additional index, which is not needed for sequential reading.
            self._stream = file.read_buffer()
            if self._stream.slice(0, 6).to_pybytes() == b"ARROW1":
                self._stream = self._stream.slice(8)
            self.columns = list(pyarrow.ipc.open_stream(self._stream).schema.names)

    def read(self, on_bad: OnBad | None = None) -> Iterator[tuple[int, Row, int]]:
        """Yield number, row and size in bytes of each row.

        Raises:
            UserError: if the file cannot be read or needs memory out of proportion to its size, or if a row is too long
                and
                ``on_bad`` is None.
        """
        first_number = 1
        with reading(self._name), reading_arrow(self._name, self._kind):
            for batch in self._batches():

                def to_rows(start: int, stop: int, batch: pyarrow.RecordBatch = batch) -> list[Row]:
                    return batch.slice(start, stop - start).to_pylist()

                yield from rows_of(batch, to_rows, first_number, self._name, on_bad, max_bytes=self._max_bytes)
                first_number += batch.num_rows

    def _batches(self) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow.ipc
        import pyarrow.parquet

        if self._kind == "parquet":
            with self._path.open("rb") as file:
                for number in range(self._parquet.num_row_groups):
                    count, dictionaries = check_group(self._parquet, number, file, self._name)
                    parquet = pyarrow.parquet.ParquetFile(
                        self._path, metadata=self._parquet.metadata, read_dictionary=dictionaries, pre_buffer=False
                    )
                    yield from parquet.iter_batches(count, row_groups=[number])
            return
        messages = pyarrow.ipc.MessageReader.open_stream(self._stream)
        checked = decoded_sizes(messages, self._name)
        stream = pyarrow.ipc.open_stream(self._stream)
        while next(checked, self) is not self:
            batch = stream.read_next_batch()
            batch.validate(full=True)  # offsets and text are used as they are
            yield batch


def rows_of(
    batch: pyarrow.RecordBatch,
    to_rows: Callable[[int, int], list[Row]],
    first_number: int,
    name: str,
    on_bad: OnBad | None,
    *,
    max_bytes: int,
) -> Iterator[tuple[int, Row, int]]:
    """Yield number, row and size in bytes of each row of a batch.

    Args:
        to_rows: Converts rows from a start to a stop index to objects.
        first_number: Number of the first row.
        name: See :class:`ArrowRows`.
        on_bad: Receives rows that are too long. Without it they raise an error.
        max_bytes: See :class:`ArrowRows`.
    """
    for start in range(0, batch.num_rows, BATCH_ROWS):
        piece = batch.slice(start, BATCH_ROWS)
        sizes = np.zeros(piece.num_rows, np.int64)
        for index, column in enumerate(piece.columns):
            sizes += _sizes(column, f"{name}, column '{piece.schema.names[index]}'", max_bytes)
        cumulative = np.cumsum(sizes)
        first = 0
        while first < len(sizes):
            max_total = int(cumulative[first] - sizes[first]) + _PART_BYTES
            stop = max(first + 1, int(np.searchsorted(cumulative, max_total, side="right")))
            is_too_long = stop == first + 1 and sizes[first] > max_bytes
            rows = [{}] if is_too_long else to_rows(start + first, start + stop)
            for index, row in enumerate(rows, start=first):
                number, size = first_number + start + index, int(sizes[index])
                if size <= max_bytes:
                    yield number, row, size
                    continue
                error = too_long_error(f"row {number}", max_bytes, location=f"{name}, row {number}", size=size)
                if on_bad is None:
                    raise error
                on_bad(error, f"<{size:,} bytes>")
            first = stop


def _sizes(array: pyarrow.Array, location: str, max_bytes: int) -> np.ndarray:
    """Return (rows,) int64 sizes of the values in bytes, as if values were not shared.

    The size is a lower bound for lists that exceed ``max_bytes``.
    """
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    width = _width(kind)
    if width is not None:
        return np.full(len(array), width, np.int64)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _sizes(array.storage, location, max_bytes)
    if types.is_dictionary(kind):
        dictionary_sizes = _sizes(array.dictionary, location, max_bytes)
        indices = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return dictionary_sizes[indices] if len(dictionary_sizes) else np.zeros(len(array), np.int64)
    if types.is_struct(kind):
        return sum((_sizes(part, location, max_bytes) for part in array.flatten()), np.zeros(len(array), np.int64))
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # the length is the first field
        return views[array.offset : array.offset + len(array), 0].astype(np.int64)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return _list_sizes(array, array.offsets.to_numpy(), location, max_bytes)
    if types.is_fixed_size_list(kind):
        offsets = np.arange(array.offset, array.offset + len(array) + 1, dtype=np.int64) * kind.list_size
        return _list_sizes(array, offsets, location, max_bytes)
    try:
        lengths = pyarrow.compute.binary_length(array).fill_null(0)
    except pyarrow.ArrowNotImplementedError:
        message = f"a column of the type {kind} cannot be read"
        raise UserError(message, location=location, hint="leave the column out") from None
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _list_sizes(array: Any, offsets: np.ndarray, location: str, max_bytes: int) -> np.ndarray:
    """Return the sizes of lists with elements ``array.values`` between ``offsets``."""
    counts = np.diff(offsets).astype(np.int64)
    width = _width(array.values.type)
    if width is not None:
        return counts * (width + _ELEMENT_BYTES)
    if len(counts) > 1 and offsets[-1] - offsets[0] > _ELEMENTS:
        half = len(counts) // 2
        halves = offsets[: half + 1], offsets[half:]
        return np.concatenate([_list_sizes(array, part, location, max_bytes) for part in halves])
    if len(counts) == 1 and counts[0] * _ELEMENT_BYTES > max_bytes:
        return counts * _ELEMENT_BYTES
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    bounds = np.concatenate([[0], np.cumsum(_sizes(values, location, max_bytes) + _ELEMENT_BYTES)])
    return np.diff(bounds[offsets - offsets[0]])


def _width(kind: pyarrow.DataType) -> int | None:
    """Return the size in bytes of each value of a type, or None if sizes vary."""
    from pyarrow import types

    if types.is_null(kind):
        return 0
    if types.is_dictionary(kind):
        return None
    if types.is_fixed_size_list(kind):
        width = _width(kind.value_type)
        return None if width is None else kind.list_size * (width + _ELEMENT_BYTES)
    if types.is_struct(kind):
        widths = [_width(field.type) for field in kind]
        return None if None in widths else sum(width for width in widths if width is not None)
    try:
        return -(-kind.bit_width // 8)
    except ValueError:
        return None
