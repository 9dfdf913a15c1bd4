"""The rows of Parquet and Arrow files, and of tables in memory, some at a time.

How much memory a row takes is computed from its columns before any of its values become objects, since one
value may stand in many rows. It knows single files; not references or what columns mean.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from deltaw.data.report import MAX_ROW_BYTES, too_long
from deltaw.data.row_files import OnBad, reading
from deltaw.data.rows import Row
from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet


# What a Parquet or Arrow file takes in memory once it is decoded, told by its headers before it is.
#
# A file of a kilobyte can stand for gigabytes: a page says how large it becomes, a dictionary repeats one
# value, and runs of equal numbers take no space. The headers that are read here are those that the decoder
# itself goes by, since what a file says of itself elsewhere (in a Parquet file's footer) need not be true. It
# knows formats; not rows.
#
# Formats: https://github.com/apache/parquet-format (``PageHeader`` of parquet.thrift, in Thrift's compact
# protocol), https://arrow.apache.org/docs/format/Columnar.html (``Message.fbs``, in flatbuffers).


# What is decoded at once may take LEAST bytes, or MOST times its bytes in the file.
LEAST, MOST = 256 * 2**20, 256
# Batches are made of so many bytes, where rows are smaller.
_BATCH_BYTES = 64 * 2**20
# Rows of a batch, at most.
BATCH_ROWS = 1024
# The longest header of a page that Arrow's own reader takes.
_LONGEST_HEADER = 16 * 2**20
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
# Types of pages. Of data pages, which have two versions: which field describes them, and which of its fields
# names the encoding.
_DICTIONARY_PAGE, _DATA_PAGES = 2, {0: (5, 2), 3: (8, 4)}
# Arrow's names of Parquet's ways to compress; nothing where a page is not.
_CODECS = {"UNCOMPRESSED": "", "SNAPPY": "snappy", "GZIP": "gzip", "ZSTD": "zstd", "BROTLI": "brotli"}
_LARGE_DICTIONARY = 2**22
# Encodings whose values are made of others': of a dictionary's (two names), and of the value before.
_DICTIONARY, _DELTA = (2, 8), 7


def check_decoded(decoded: int, stored: int, where: str, hint: str) -> None:
    """Refuse what would take ``decoded`` bytes in memory and takes ``stored`` in its file, if that is out of
    proportion."""
    if decoded > max(LEAST, MOST * stored):
        raise UserError(f"{stored:,} bytes of the file would become {decoded:,} in memory", where=where, hint=hint)


# Parquet


@dataclass
class _Column:
    """The pages of one column in a group of rows.

    Attributes:
        page, dictionary, entry: bytes of the largest page, of the dictionary and of its longest text.
        total: of all pages.
        densest: bytes of a value on average, in the page where that is most.
        repeating, longest: values that are made of others, and the most bytes that one of these may have.
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
    """Look through the pages of a group of rows.

    Args:
        file: the same file. name: for messages.

    Returns:
        how many rows a batch should have, and the numbers of the columns to be read as dictionaries, without which
        their values would be repeated too often.

    Raises:
        UserError: it is damaged, or decoding it takes memory out of all proportion to its size.
    """
    group = parquet.metadata.row_group(number)
    size = file.seek(0, 2)
    where = f"{name}, group {number + 1} of rows"
    needed = stored = 0
    dense = 1.0
    dictionaries = []
    for place in range(group.num_columns):
        chunk, described = group.column(place), parquet.schema.column(place)
        stored += chunk.total_compressed_size
        try:
            found = _pages(chunk, file, size)
        except (LookupError, ValueError, TypeError) as error:
            what = f"a page header of the column '{chunk.path_in_schema}' cannot be read: {error}"
            raise UserError(what, where=where, hint="copy the file again") from error
        width = _WIDTHS.get(chunk.physical_type, max(0, described.length))
        is_text, is_list = chunk.physical_type == "BYTE_ARRAY", described.max_repetition_level > 0
        needed += found.page + found.dictionary
        repeated = found.repeating * found.longest if is_text else 0
        if is_list:  # one row may have all values
            if repeated > _BATCH_BYTES and found.longest == found.entry:
                dictionaries.append(place)
                repeated = 0
            needed += found.values * (width + 8) + repeated + (found.total if is_text else 0)
            dense += found.total / max(1, group.num_rows)
        elif is_text:
            needed += 2 * found.page + found.longest
            dense += found.densest + found.longest
        else:
            dense += width
    hint = "if it is right, write it again with smaller groups (row_group_size)"
    check_decoded(needed, min(stored, size), where, hint)
    return max(1, min(BATCH_ROWS, int(_BATCH_BYTES / dense))), dictionaries


def _pages(chunk: pyarrow.parquet.ColumnChunkMetaData, file: IO[bytes], size: int) -> _Column:
    """What the headers of a column's pages say.

    Raises:
        ValueError, LookupError, TypeError: they cannot be read.
    """
    found = _Column()
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < at:
        at = chunk.dictionary_page_offset
    end = at + chunk.total_compressed_size
    if not 0 <= at <= end <= size:
        raise ValueError("it lies outside of the file")
    while at < end and found.values < chunk.num_values:
        header, length = _header(file, at)
        decoded, stored = int(header[2]), int(header[3])  # type: ignore[call-overload]
        if decoded < 0 or stored < 0:
            raise ValueError("a page has a negative size")
        begin, at = at + length, at + length + stored
        if header[1] == _DICTIONARY_PAGE:
            found.dictionary = max(found.dictionary, decoded)
            if chunk.physical_type == "BYTE_ARRAY":
                file.seek(begin)
                page = file.read(min(stored, _LARGE_DICTIONARY))
                found.entry = max(found.entry, _longest_entry(page, chunk.compression, decoded))
        elif header[1] in _DATA_PAGES:
            number, encoding_at = _DATA_PAGES[header[1]]
            fields: dict[int, int] = header[number]  # type: ignore[assignment]
            values, encoding = int(fields[1]), fields[encoding_at]
            found.page = max(found.page, decoded)
            found.total += decoded
            found.values += max(0, values)
            found.densest = max(found.densest, decoded / max(1, values))
            if encoding in _DICTIONARY or encoding == _DELTA:
                found.repeating += max(0, values)
                found.longest = max(found.longest, found.entry if encoding in _DICTIONARY else decoded)
    return found


def _longest_entry(page: bytes, compression: str, decoded: int) -> int:
    """The bytes of the longest text of a dictionary, which becomes ``decoded`` bytes; of a large dictionary,
    and of one that is packed in a way that is not known here, those of all."""
    import pyarrow

    codec = _CODECS.get(compression)
    if decoded > _LARGE_DICTIONARY or codec is None:
        return decoded
    try:
        texts = pyarrow.Codec(codec).decompress(page, decoded).to_pybytes() if codec else page
    except pyarrow.ArrowException:
        return decoded
    longest = at = 0
    while at + 4 <= len(texts):
        length = int.from_bytes(texts[at : at + 4], "little")
        longest = max(longest, length)
        at += 4 + length
    return longest


def _header(file: IO[bytes], at: int) -> tuple[dict[int, object], int]:
    """The fields of the page header at ``at``, by their numbers, and its length."""
    length = 2**10
    while True:
        file.seek(at)
        data = file.read(length)
        thrift = _Thrift(data)
        try:
            return thrift.fields(0), thrift.at
        except IndexError:
            if len(data) < length or length > _LONGEST_HEADER:
                raise
            length *= 8


# Thrift's types of true, false, bytes and doubles: the bytes that they take.
_FIXED_BYTES = {1: 0, 2: 0, 3: 1, 7: 8}


class _Thrift:
    """Reads structs of Thrift's compact protocol; of what they hold, integers and structs are kept."""

    def __init__(self, data: bytes) -> None:
        self.at = 0
        self._data = data

    def fields(self, depth: int) -> dict[int, object]:
        """The fields of a struct by their numbers."""
        found: dict[int, object] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            found[number] = self._value(head & 15, depth)
        return found

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
            raise IndexError("the header ends too early")

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
    """Look at the messages of an Arrow stream, one record batch and the dictionaries before it at a step.

    Raises:
        UserError: decompressing what comes next takes memory out of all proportion to its size.
    """
    kept = stored = 0
    number = 0
    for message in messages:
        kind, batch = _batch_of(message.metadata)
        if batch is None:
            continue
        number += 1
        body = memoryview(message.body)
        # The bytes that a compressed buffer becomes stand before it; -1 there means that it is not compressed.
        decoded = sum(max(0, _read("<q", body, offset)) for offset, length in _compressed(batch) if length)
        stored += len(body)
        hint = "if it is right, write it again in smaller batches or uncompressed"
        check_decoded(decoded + kept, stored, f"{name}, message {number}", hint)
        if kind == _DICTIONARY_BATCH:
            kept += decoded
        else:
            yield


@dataclass(frozen=True)
class _Table:
    """A table of a flatbuffer: ``at`` is its place in ``data``."""

    data: memoryview
    at: int

    def field(self, number: int) -> int:
        """The place of a field's value; 0 where the table has none."""
        places = self.at - _read("<i", self.data, self.at)
        entry = 4 + 2 * number
        if entry >= _read("<H", self.data, places):
            return 0
        offset = _read("<H", self.data, places + entry)
        return self.at + offset if offset else 0

    def table(self, number: int) -> _Table | None:
        """The table that a field holds."""
        at = self.field(number)
        return _Table(self.data, at + _read("<I", self.data, at)) if at else None


def _read(form: str, data: memoryview, at: int) -> int:
    try:
        return int(struct.unpack_from(form, data, at)[0])
    except struct.error as error:
        raise ValueError(str(error)) from error


def _batch_of(metadata: pyarrow.Buffer) -> tuple[int, _Table | None]:
    """The kind of a message, and the record batch that it holds, for itself or as a dictionary's values."""
    data = memoryview(metadata).cast("B")
    message = _Table(data, _read("<I", data, 0))
    at = message.field(1)
    kind = data[at] if at else 0
    header = message.table(2) if kind in (_RECORD_BATCH, _DICTIONARY_BATCH) else None
    return kind, header.table(1) if header is not None and kind == _DICTIONARY_BATCH else header


def _compressed(batch: _Table) -> Iterator[tuple[int, int]]:
    """Places and lengths of a record batch's compressed buffers."""
    at = batch.field(2)
    if not at or not batch.field(3):
        return
    at += _read("<I", batch.data, at)
    for number in range(_read("<I", batch.data, at)):
        place = at + 4 + 16 * number
        yield _read("<q", batch.data, place), _read("<q", batch.data, place + 8)


# Rows that are made into objects at once take about so many bytes, unless one alone takes more.
_PART_BYTES = 2**20
# Elements of lists whose sizes are computed at once.
_ELEMENTS = 2**22
# What an element of a list counts beside its value: a list of nulls takes memory too, as objects.
_ELEMENT_BYTES = 8


@contextlib.contextmanager
def reading_arrow(name: str, kind: str) -> Iterator[None]:
    """While open, what a damaged file raises becomes a UserError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, ValueError, LookupError, ArithmeticError) as error:
        # Besides Arrow's own: text that is not UTF-8, headers that point outside, times beyond Python's.
        hint = "copy the file again, and check that its suffix matches its content"
        shown = "Parquet file" if kind == "parquet" else "Arrow file"
        raise UserError(f"the {shown} cannot be read: {error}", where=name, hint=hint) from error


class ArrowRows:
    """The rows of a Parquet or Arrow file.

    Args:
        name: of the file, for messages. kind: "parquet" or "arrow".
        max_bytes: the most bytes that a row may have.

    Attributes:
        columns: their names. rows: how many rows there are; None where only reading the file tells.
    """

    def __init__(self, path: Path, name: str, kind: str, *, max_bytes: int = MAX_ROW_BYTES) -> None:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet

        self._path, self._name, self._kind, self._most = path, name, kind, max_bytes
        self.rows: int | None = None
        with reading(name), reading_arrow(name, kind):
            if kind == "parquet":
                self._parquet = pyarrow.parquet.ParquetFile(path)
                self.columns = list(self._parquet.schema_arrow.names)
                self.rows = self._parquet.metadata.num_rows
                return
            file = pyarrow.memory_map(str(path))
            # What a file has more than a stream, an index at its end, is not needed to read all of it.
            self._stream = file.read_buffer()
            if self._stream.slice(0, 6).to_pybytes() == b"ARROW1":
                self._stream = self._stream.slice(8)
            self.columns = list(pyarrow.ipc.open_stream(self._stream).schema.names)

    def read(self, on_bad: OnBad | None = None) -> Iterator[tuple[int, Row, int]]:
        """Number, row and bytes of each row.

        Raises:
            UserError: the file cannot be read, decoding it takes memory out of all proportion, or a row is
                too long and there is no ``on_bad`` to be told of it.
        """
        begin = 1
        with reading(self._name), reading_arrow(self._name, self._kind):
            for batch in self._batches():

                def made(start: int, stop: int, batch: pyarrow.RecordBatch = batch) -> list[Row]:
                    return batch.slice(start, stop - start).to_pylist()

                yield from rows_of(batch, made, begin, self._name, on_bad, max_bytes=self._most)
                begin += batch.num_rows

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
    made: Callable[[int, int], list[Row]],
    begin: int,
    name: str,
    on_bad: OnBad | None,
    *,
    max_bytes: int,
) -> Iterator[tuple[int, Row, int]]:
    """Number, row and bytes of each row of a batch.

    Args:
        made: the rows from a place up to another, as objects. begin: the number of the first.
        name, on_bad, max_bytes: as in :class:`ArrowRows`.
    """
    for start in range(0, batch.num_rows, BATCH_ROWS):
        piece = batch.slice(start, BATCH_ROWS)
        sizes = np.zeros(piece.num_rows, np.int64)
        for place, column in enumerate(piece.columns):
            sizes += _sizes(column, f"{name}, column '{piece.schema.names[place]}'", max_bytes)
        ends = np.cumsum(sizes)
        first = 0
        while first < len(sizes):
            most = int(ends[first] - sizes[first]) + _PART_BYTES
            stop = max(first + 1, int(np.searchsorted(ends, most, side="right")))
            alone = stop == first + 1 and sizes[first] > max_bytes
            rows = [{}] if alone else made(start + first, start + stop)
            for place, row in enumerate(rows, start=first):
                number, size = begin + start + place, int(sizes[place])
                if size <= max_bytes:
                    yield number, row, size
                    continue
                error = too_long(f"row {number}", max_bytes, where=f"{name}, row {number}", size=size)
                if on_bad is None:
                    raise error
                on_bad(error, f"<{size:,} bytes>")
            first = stop


def _sizes(array: pyarrow.Array, where: str, max_bytes: int) -> np.ndarray:
    """int64 (rows,): the bytes that each value takes for itself, however it is shared in the column. Of lists
    of more elements than ``max_bytes`` allows, a lower bound."""
    import pyarrow
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    width = _width(kind)
    if width is not None:
        return np.full(len(array), width, np.int64)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _sizes(array.storage, where, max_bytes)
    if types.is_dictionary(kind):
        once = _sizes(array.dictionary, where, max_bytes)
        places = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return once[places] if len(once) else np.zeros(len(array), np.int64)
    if types.is_struct(kind):
        return sum((_sizes(part, where, max_bytes) for part in array.flatten()), np.zeros(len(array), np.int64))
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)  # the length comes first
        return views[array.offset : array.offset + len(array), 0].astype(np.int64)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        return _list_sizes(array, array.offsets.to_numpy(), where, max_bytes)
    if types.is_fixed_size_list(kind):
        offsets = np.arange(array.offset, array.offset + len(array) + 1, dtype=np.int64) * kind.list_size
        return _list_sizes(array, offsets, where, max_bytes)
    try:
        lengths = pyarrow.compute.binary_length(array).fill_null(0)
    except pyarrow.ArrowNotImplementedError:
        what = f"a column of the type {kind} cannot be read"
        raise UserError(what, where=where, hint="leave the column out") from None
    return lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _list_sizes(array: Any, offsets: np.ndarray, where: str, max_bytes: int) -> np.ndarray:
    """The sizes of lists whose elements are those of ``array.values`` between their ``offsets``."""
    counts = np.diff(offsets).astype(np.int64)
    width = _width(array.values.type)
    if width is not None:
        return counts * (width + _ELEMENT_BYTES)
    if len(counts) > 1 and offsets[-1] - offsets[0] > _ELEMENTS:
        half = len(counts) // 2
        return np.concatenate(
            [_list_sizes(array, part, where, max_bytes) for part in (offsets[: half + 1], offsets[half:])]
        )
    if len(counts) == 1 and counts[0] * _ELEMENT_BYTES > max_bytes:
        return counts * _ELEMENT_BYTES
    values = array.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    ends = np.concatenate([[0], np.cumsum(_sizes(values, where, max_bytes) + _ELEMENT_BYTES)])
    return np.diff(ends[offsets - offsets[0]])


def _width(kind: pyarrow.DataType) -> int | None:
    """The bytes of each value of a type; None where values differ."""
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
