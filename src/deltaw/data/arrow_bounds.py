"""What a Parquet or Arrow file takes in memory once it is decoded, told by its headers before it is.

A file of a kilobyte can stand for gigabytes: a page says how large it becomes, a dictionary repeats one
value, and runs of equal numbers take no space. The headers that are read here are those that the decoder
itself goes by, since what a file says of itself elsewhere (in a Parquet file's footer) need not be true. It
knows formats; not rows.

Formats: https://github.com/apache/parquet-format (``PageHeader`` of parquet.thrift, in Thrift's compact
protocol), https://arrow.apache.org/docs/format/Columnar.html (``Message.fbs``, in flatbuffers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from deltaw.errors import UserError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

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
        raise UserError(
            f"{stored:,} bytes of the file would become {decoded:,} bytes in memory", where=where, hint=hint
        )


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


@dataclass(frozen=True)
class Group:
    """How to read a group of rows.

    Attributes:
        rows: of a batch. dictionaries: numbers of the columns to be read as dictionaries, without which their
            values would be repeated too often.
    """

    rows: int
    dictionaries: tuple[int, ...]


def check_group(parquet: pyarrow.parquet.ParquetFile, number: int, file: IO[bytes], name: str) -> Group:
    """Look through the pages of a group of rows.

    Args:
        file: the same file. name: for messages.

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
            raise UserError(
                f"a page header of the column '{chunk.path_in_schema}' cannot be read: {error}",
                where=where,
                hint="copy the file again",
            ) from error
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
    return Group(max(1, min(BATCH_ROWS, int(_BATCH_BYTES / dense))), tuple(dictionaries))


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
                longest = found.entry if encoding in _DICTIONARY else decoded
                found.longest = max(found.longest, longest)
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
        if kind in (1, 2):  # true and false
            return None
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.fields(depth + 1)
        if kind == 8:
            self._pass_over(self._varint())
        elif kind in (3, 7):
            self._pass_over(1 if kind == 3 else 8)
        elif kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(count):
                if head & 15 in (1, 2):
                    self._pass_over(1)
                else:
                    self._value(head & 15, depth + 1)
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
        decoded = sum(_decoded(body, offset, length) for offset, length in _compressed(batch))
        stored += len(body)
        check_decoded(
            decoded + kept,
            stored,
            f"{name}, message {number}",
            "if it is right, write it again in smaller batches or uncompressed",
        )
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


def _decoded(body: memoryview, offset: int, length: int) -> int:
    """The bytes that a compressed buffer becomes, which stand before it; -1 there means that it is not."""
    return max(0, _read("<q", body, offset)) if length else 0
