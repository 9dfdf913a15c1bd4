"""Readers of text files (JSON Lines, JSON, CSV, TSV), possibly compressed.

Memory per row is limited, even if a compressed file expands a lot.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import sys
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from deltaw.data.report import BadRowError, too_long_error
from deltaw.data.rows import Row
from deltaw.errors import UserError
from deltaw.settings.data import MAX_ROW_BYTES

# Maximum nesting depth of JSON values, so that later code can use recursion. Rows with tools have about a dozen levels.
LEVELS = 100


def parse(text: str) -> object:
    """Parse a JSON text.

    Raises:
        ValueError: if it is not JSON, has more than :data:`LEVELS` levels, or a number with too many digits.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it has more than {LEVELS} levels") from None
    if text.count("[") + text.count("{") > LEVELS:
        check_levels(value)
    return value


def check_levels(value: object) -> None:
    """Raise a ValueError if a value has too many levels of lists and objects."""
    level = [value]
    for _ in range(LEVELS + 1):
        inner: list[object] = []
        for item in level:
            if isinstance(item, list | dict):
                inner += [v for v in (item.values() if isinstance(item, dict) else item) if isinstance(v, list | dict)]
        if not inner:
            return
        level = inner
    raise ValueError(f"it has more than {LEVELS} levels")


KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv"}
KINDS |= {".parquet": "parquet", ".arrow": "arrow"}
# File types with typed columns.
TYPED = ("parquet", "arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
SUPPORTED_FORMATS = "jsonl, json, csv, tsv (also as .gz, .bz2, .xz, .zst), parquet or arrow"
# Memory limit of .xz decompression. The strongest preset needs 65 MiB, a malicious file up to 4 GiB.
_XZ_BYTES = 256 * 2**20
_BLOCK = 2**16
# A compressed file may expand to MIN_EXPANDED_BYTES, or to MAX_EXPANSION times its size.
MIN_EXPANDED_BYTES = 32 * 2**20
MAX_EXPANSION = 256

# Receives the error and the raw content of an unreadable row, which is then skipped.
OnBad = Callable[[BadRowError, object], None]


def kind_of(path: Path) -> str | None:
    """Return the type of a file by its name, or None if it contains no rows."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return kind if kind not in TYPED or path.suffix.lower() == f".{kind}" else None


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert exceptions from missing, damaged or unreadable files to UserErrors."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check that it is complete, and that you have permission to read it"
        raise UserError(f"the file cannot be read: {reason}", location=name, hint=hint) from error


class DecompressedFile:
    """Open file, decompressed on the fly.

    Attributes:
        file: Decompressed content.
    """

    def __init__(self, path: Path) -> None:
        self._raw: IO[bytes] = path.open("rb")
        try:
            self.file: IO[bytes] = _decompressed(self._raw, path.suffix.lower())
            if self.file is not self._raw:
                self.file = io.BufferedReader(_Bounded(self.file, path), 2**18)
            file: Any = self.file  # all decompressors have peek()
            check_content(file.peek(_BEGINNING)[:_BEGINNING], path)
        except BaseException:
            self._raw.close()
            raise

    @property
    def position(self) -> int:
        """Return the number of bytes of the compressed file that were read so far."""
        return 0 if self._raw.closed else self._raw.tell()

    def __enter__(self) -> DecompressedFile:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # damage was reported already
            self.file.close()
        self._raw.close()


_BEGINNING = 8192
_SIGNATURES = {
    b"PAR1\x15": "a Parquet file",
    b"ARROW1\0": "an Arrow file",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh91AY&SY": "compressed with bzip2",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard",
}
_ENCODINGS = {"utf-32": "UTF-32", "utf-32-le": "UTF-32", "utf-32-be": "UTF-32"}
_ENCODINGS |= {"utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}


def check_content(beginning: bytes, path: Path) -> None:
    """Reject a text file if its first bytes are those of another file type or text encoding.

    Raises:
        UserError: if they are. The message names the actual type.
    """
    for signature, kind in _SIGNATURES.items():
        if beginning.startswith(signature):
            hint = "rename the file so that its suffix matches its content, or unpack it"
            raise UserError(f"the file is {kind}, but its name has another suffix", location=str(path), hint=hint)
    if b"\0" in beginning or beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        complete = beginning[: len(beginning) // 4 * 4]
        for encoding, name in _ENCODINGS.items():
            if _unreadable_share(complete.decode(encoding, "replace")) < 0.05 and complete:
                raise UserError(f"the file is text in {name}", location=str(path), hint="save the file as UTF-8")
    if len(beginning) > 64 and _unreadable_share(beginning.decode("utf-8", "replace")) > 0.3:
        hint = "save the file as UTF-8, or rename it if it is no text"
        raise UserError("the file is binary, or text in another encoding than UTF-8", location=str(path), hint=hint)


def _unreadable_share(text: str) -> float:
    """Return the share of characters that are replaced, unassigned or control characters."""
    bad = sum((unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\t\n\r") or c == "\ufffd" for c in text)
    return bad / max(1, len(text))


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    opened: Any = raw
    if suffix == ".gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif suffix == ".bz2":
        opened = bz2.BZ2File(raw)
    elif suffix == ".xz":
        opened = _Xz(raw)
    elif suffix == ".zst":
        import pyarrow

        # Arrow includes a decompressor, so that no further package is needed.
        opened = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return opened


class _Bounded(io.RawIOBase):
    """Decompressed content of a file, which must not expand out of proportion to its size."""

    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self._remaining = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = int(self._file.readinto(buffer))
        self._remaining -= count
        if self._remaining < 0:
            message = f"the file expands to more than {MAX_EXPANSION} times its size"
            raise UserError(message, location=str(self._path), hint="if it is correct, decompress it first")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Xz(io.RawIOBase):
    """Decompressed content of an .xz file, with a memory limit that lzma.LZMAFile lacks."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._stream: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._stream is None or self._stream.eof:  # concatenated streams, padded with zeros
                data = b"" if self._stream is None else self._stream.unused_data.lstrip(b"\0")
                while not data:
                    block = self._raw.read(_BLOCK)
                    if not block:
                        return 0
                    data = block if self._stream is None else block.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor(memlimit=_XZ_BYTES)
            elif self._stream.needs_input:
                data = self._raw.read(_BLOCK)
                if not data:
                    raise EOFError("it is truncated")
            decompressed = self._stream.decompress(data, len(buffer))
            if decompressed:
                buffer[: len(decompressed)] = decompressed
                return len(decompressed)


# JSON Lines


def read_lines(
    file: IO[bytes], name: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES
) -> Iterator[tuple[int, Row, int]]:
    """Yield number, row and size in bytes of each nonblank line of JSON Lines.

    Args:
        max_bytes: Maximum size of a line. The remainder of a longer line is skipped without storing it.

    Raises:
        UserError: if a line is too long or not a JSON object, and ``on_bad`` is None.
    """
    number = offset = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        size = len(line)
        try:
            if size > max_bytes:
                location = f"{name}, line {number} (from byte {offset:,} of its text on)"
                hint = "every line must be one JSON object; a file with one list must be named .json"
                raise too_long_error(f"line {number}", max_bytes, location=location, hint=hint)
            row = _row_of_line(line, number, name)
        except BadRowError as error:
            if on_bad is None:
                raise
            on_bad(error, line.decode("utf-8", "replace"))
            row = None
        if row is not None:
            yield number, row, size
        while size > max_bytes and not line.endswith(b"\n") and (line := file.readline(_BLOCK)):
            size += len(line)
        offset += size


def _row_of_line(line: bytes, number: int, name: str) -> Row | None:
    """Return the object of a line, or None if the line is blank."""
    text = decode(line, name, first_line=number)
    if not text.strip():
        return None
    location = f"{name}, line {number}"
    hint = "every line is one JSON object, such as "
    try:
        row = parse(text)
    except ValueError as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        message = f"line {number} is not JSON: {reason}"
        hint = hint + '{"prompt": "…", "completion": "…"}'
        raise BadRowError(message, reason="not JSON", location=location, hint=hint) from error
    if not isinstance(row, dict):
        message = f"line {number} is not a JSON object but of type {type(row).__name__}"
        hint = hint + '{"text": "…"}'
        raise BadRowError(message, reason="not a JSON object", location=location, hint=hint)
    return row


def decode(data: bytes, name: str, first_line: int = 1) -> str:
    """Decode UTF-8 text, without a byte order mark at the start of the file.

    Raises:
        UserError: if it is not UTF-8. The message names the line.
    """
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, name, first_line) from error


def not_utf8(error: UnicodeDecodeError, name: str, first_line: int) -> BadRowError:
    """Return the error for invalid bytes that start in line ``first_line``."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    message = f"line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return BadRowError(message, reason="not UTF-8", location=f"{name}, line {line}", hint="save the file as UTF-8")


# Tables


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
        has_header: True if the column names come from the file.

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


# Incremental reading of a JSON list.

_CHARACTERS = 2**18
_SPACE = re.compile(r"[ \t\n\r]*")
# Distance from the end of the buffer within which a parse error may be caused by a truncated literal (the longest one
# is -Infinity with nine characters).
_LITERAL = 16


def read_json(file: IO[bytes], name: str, *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[tuple[int, Row, int]]:
    """Yield number, object and size in characters of each object of a JSON list. Yield no rows for a blank file.

    Args:
        max_bytes: Maximum number of characters of an object.

    Raises:
        UserError: if the file is not a list of JSON objects, or an object is too long. The message names the row.
    """
    text = _JSONText(file, name, max_bytes)
    first = text.peek()
    if not first:
        return
    if first != "[":
        raise _no_list(text, name)
    text.step()
    number = 0
    while number or text.peek() != "]":
        number += 1
        row, size = text.value(f"row {number}", f"{name}, row {number}")
        if not isinstance(row, dict):
            message = f"row {number} is not an object but of type {type(row).__name__}"
            raise UserError(message, location=f"{name}, row {number}", hint='a row is an object, such as {"text": "…"}')
        yield number, row, size
        separator = text.peek()
        if separator == "]":
            break
        if separator != ",":
            raise text.error("Expecting ',' delimiter", f"{name}, row {number}", text.at)
        text.step()
    text.step()
    if text.peek():
        raise text.error("Extra data", name, text.at)


def object_lines(file: IO[bytes], name: str, *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[tuple[int, int]]:
    """Yield the number and first line of each object of a JSON list."""
    text = _JSONText(file, name, max_bytes)
    number = 0
    while text.peek() in tuple("[,"):
        text.step()
        text.peek()
        number += 1
        yield number, text.line(text.at)
        text.value(f"row {number}", name)


class _JSONText:
    """Buffered text of a file, from which more is read on demand.

    Attributes:
        text: Buffered text.
        at: Position of the next character in the buffer.
    """

    def __init__(self, file: IO[bytes], name: str, max_bytes: int) -> None:
        self.text = ""
        self.at = 0
        self._file = file
        self._name = name
        self._max_bytes = max_bytes
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._line = 1  # line number at the start of the buffer
        self._read_lines = 1  # line number of the next text to read

    def peek(self) -> str:
        """Return the next character that is not white space, or an empty string at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def step(self) -> None:
        """Skip one character."""
        self.at += 1

    def value(self, subject: str, location: str) -> tuple[object, int]:
        """Parse the next value and return it with its number of characters.

        Args:
            subject: See :func:`deltaw.data.report.too_long_error`.
            location: See :func:`deltaw.data.report.too_long_error`.
        """
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
                if end - self.at > LEVELS:
                    check_levels(value)
            except json.JSONDecodeError as error:
                is_complete = error.pos < len(self.text) - _LITERAL and not error.msg.startswith("Unterminated")
                if is_complete or (len(self.text) - self.at <= self._max_bytes and not self._more()):
                    raise self.error(error.msg, location, error.pos) from error
                if len(self.text) - self.at > self._max_bytes:
                    raise too_long_error(subject, self._max_bytes, location=location).of_file() from None
                continue
            except RecursionError:
                raise self.error(f"it has more than {LEVELS} levels", location, self.at) from None
            except ValueError as error:  # too many digits or levels
                raise self.error(str(error), location, self.at) from error
            size = end - self.at
            if size > self._max_bytes:
                raise too_long_error(subject, self._max_bytes, location=location).of_file()
            self.at = end
            return value, size

    def error(self, reason: str, location: str, at: int) -> UserError:
        """Return the error for invalid JSON at position ``at`` of the buffer."""
        return UserError(f"the file is not JSON: {reason}", location=f"{location} (line {self.line(at)})")

    def line(self, at: int) -> int:
        """Return the line number of a position in the buffer."""
        return self._line + self.text.count("\n", 0, at)

    def _more(self) -> bool:
        """Read more text, doubling the buffer to avoid parsing long values repeatedly. Return False at the end."""
        self._line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :]
        self.at = 0
        size = max(_CHARACTERS, min(len(self.text), self._max_bytes + 1 - len(self.text)))
        while data := self._file.read(size):
            text = self._decoded(data)
            self._read_lines += text.count("\n")
            if text:
                self.text += text
                return True
        self._decoded(b"", final=True)
        return False

    def _decoded(self, data: bytes, final: bool = False) -> str:
        try:
            return self._bytes.decode(data, final)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._name, self._read_lines).of_file() from error


def _no_list(text: _JSONText, name: str) -> UserError:
    """Return the error for a file that does not contain a list, with a hint about its content."""
    value, _ = text.value("the file is not a list of objects, and its first value", name)
    if isinstance(value, dict) and text.peek():
        return UserError("the file is not a list of objects", location=name, hint="for JSON lines, name it .jsonl")
    list_keys = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    hint = f"; extract the list under '{list_keys[0]}'" if list_keys else ""
    return UserError("the file is not a list of objects", location=name, hint="it must be [{…}, {…}]" + hint)
