"""A text file becomes rows, one after another: its type and compression by its name, errors with their line.

A row is in memory only up to a limit on its bytes, however far a compressed file expands. It knows single
files; not references, folders or what columns mean.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from deltaw.data.report import MAX_ROW_BYTES, BadRowError, too_long
from deltaw.data.rows import Row
from deltaw.errors import UserError

# JSON from anywhere as values: a limit on its levels, so that whatever follows may use recursion.


# Python's own limit is near a thousand, less what calls it; rows and their tools have a dozen levels.
LEVELS = 100


def parse(text: str) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, has a number of too many digits, or too many levels.
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
        for one in level:
            if isinstance(one, list | dict):
                inner += [v for v in (one.values() if isinstance(one, dict) else one) if isinstance(v, list | dict)]
        if not inner:
            return
        level = inner
    raise ValueError(f"it has more than {LEVELS} levels")


KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
# Types whose columns have a type of their own.
TYPED = ("parquet", "arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KNOWN = "jsonl, json, csv, tsv (also as .gz, .bz2, .xz, .zst), parquet or arrow"
# What an .xz file may need in memory: its strongest preset needs 65 MiB, a hostile one up to 4 GiB.
_XZ_BYTES = 256 * 2**20
_BLOCK = 2**16

# Told of a row that cannot be read, where such rows are to be skipped, and given the row as it stands in the file.
OnBad = Callable[[BadRowError, object], None]


def kind_of(path: Path) -> str | None:
    """The type of a file by its name, compressed or not; None for a file that holds no rows."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return kind if kind not in TYPED or path.suffix.lower() == f".{kind}" else None


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """While open, what a damaged, missing or forbidden file raises becomes a UserError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        hint = "check that it is complete, and that you may read it"
        raise UserError(f"the file cannot be read: {said}", where=name, hint=hint) from error


class Opened:
    """A file of bytes, decompressed on the way.

    Attributes:
        file: lines and bytes of its content.
    """

    def __init__(self, path: Path) -> None:
        self._raw: IO[bytes] = path.open("rb")
        try:
            self.file: IO[bytes] = _decompressed(self._raw, path.suffix.lower())
            peeked: Any = self.file  # every decompressor can look ahead
            check_content(peeked.peek(_BEGINNING)[:_BEGINNING], path)
        except BaseException:
            self._raw.close()
            raise

    @property
    def position(self) -> int:
        """Bytes of the file on the disk that were read so far."""
        return 0 if self._raw.closed else self._raw.tell()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # of a damaged stream, which was said already
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
    """Reject a text file whose first bytes are another kind of file, or text in another encoding.

    Raises:
        UserError: it is; the message says what the file is instead.
    """
    for signature, kind in _SIGNATURES.items():
        if beginning.startswith(signature):
            hint = "rename the file so that its suffix matches its content, or unpack it"
            raise UserError(f"the file is {kind}, which its name does not say", where=str(path), hint=hint)
    if b"\0" in beginning or beginning[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        whole = beginning[: len(beginning) // 4 * 4]
        for encoding, name in _ENCODINGS.items():
            if _unreadable_share(whole.decode(encoding, "replace")) < 0.05 and whole:
                raise UserError(f"the file is text in {name}", where=str(path), hint="save the file as UTF-8")
    if len(beginning) > 64 and _unreadable_share(beginning.decode("utf-8", "replace")) > 0.3:
        hint = "save the file as UTF-8, or rename it if it is no text"
        raise UserError("the file is binary, or text in another encoding than UTF-8", where=str(path), hint=hint)


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
        opened = io.BufferedReader(_Xz(raw), _BLOCK)
    elif suffix == ".zst":
        import pyarrow

        # Arrow has its own decompressor, so that no further package is needed.
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        opened = io.BufferedReader(stream, 2**18)
    return opened


class _Xz(io.RawIOBase):
    """The decompressed bytes of an .xz file; unlike lzma.LZMAFile, with a limit on the memory that its header
    may ask for."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._stream: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._stream is None or self._stream.eof:  # streams follow one another, zeros between them
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
                    raise EOFError("it ends before its last block does")
            found = self._stream.decompress(data, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)


# JSON Lines


def read_lines(
    file: IO[bytes], name: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES
) -> Iterator[tuple[int, Row, int]]:
    """Number, row and bytes of each line of JSON Lines that is not blank.

    Args:
        max_bytes: of a line; of a longer one so much is read, and the rest is passed over.

    Raises:
        UserError: a line is no JSON object or too long, and there is no ``on_bad`` to be told of it.
    """
    number = begin = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        size = len(line)
        try:
            if size > max_bytes:
                where = f"{name}, line {number} (from byte {begin:,} of its text on)"
                hint = "every line is one JSON object, and a file that is one list is named .json"
                raise too_long(f"line {number}", max_bytes, where=where, hint=hint)
            row = _row_of_line(line, number, name)
        except BadRowError as bad:
            if on_bad is None:
                raise
            on_bad(bad, line.decode("utf-8", "replace"))
            row = None
        if row is not None:
            yield number, row, size
        while size > max_bytes and not line.endswith(b"\n") and (line := file.readline(_BLOCK)):
            size += len(line)
        begin += size


def _row_of_line(line: bytes, number: int, name: str) -> Row | None:
    """The object of a line; None for a blank one."""
    text = decode(line, name, first_line=number)
    if not text.strip():
        return None
    where, hint = f"{name}, line {number}", "every line is one JSON object, such as "
    try:
        row = parse(text)
    except ValueError as error:
        said = str(error)
        if isinstance(error, json.JSONDecodeError):
            said = f"{error.msg.removesuffix(' at')}, column {error.colno}"
        what, hint = f"line {number} is not JSON: {said}", hint + '{"prompt": "…", "completion": "…"}'
        raise BadRowError(what, reason="not JSON", where=where, hint=hint) from error
    if not isinstance(row, dict):
        what, hint = f"line {number} is not a JSON object but a {type(row).__name__}", hint + '{"text": "…"}'
        raise BadRowError(what, reason="not a JSON object", where=where, hint=hint)
    return row


def decode(data: bytes, name: str, first_line: int = 1) -> str:
    """UTF-8 text, without the mark that may begin a file.

    Raises:
        UserError: it is not UTF-8; names the line.
    """
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, name, first_line) from error


def not_utf8(error: UnicodeDecodeError, name: str, first_line: int) -> BadRowError:
    """The error for bytes whose first ones are in line ``first_line``."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    what = f"line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x})"
    return BadRowError(what, reason="not UTF-8", where=f"{name}, line {line}", hint="save the file as UTF-8")


# Tables


_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def delimiter_of(beginning: bytes) -> str:
    """What separates the cells of a table that is not named .tsv: a comma, unless its first line has none, and it
    and the second have semicolons or tabs, as some spreadsheets write."""
    lines = beginning.splitlines()[:2]
    if not lines or b"," in lines[0]:
        return ","
    return next((mark for mark in (";", "\t") if all(mark.encode() in line for line in lines)), ",")


class TableReader:
    """The cells of a table, row after row.

    Every cell stays a string, unchanged: "1", "NA" and "" are answers like any other. A first row of numbers
    only is not a header: the columns are then column_1, column_2, and so on.

    Args:
        file: the table's bytes. name: of the file, for messages.
        on_bad: told of a row with too few or too many cells, which is skipped then.
        max_bytes: the most characters in a row. A longer one is an error also with ``on_bad``, since only
            reading all of it would tell where the next one begins.

    Attributes:
        header: names of the columns; empty for an empty file. has_header: whether they come from the file.

    Raises:
        UserError: the table cannot be read; names row and line. Also raised on the way.
    """

    def __init__(
        self, file: IO[bytes], name: str, delimiter: str, on_bad: OnBad | None = None, *, max_bytes: int = MAX_ROW_BYTES
    ) -> None:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        self._name = name
        self._delimiter = delimiter
        self._on_bad = on_bad
        self._text = _Lines(file, name, max_bytes)
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
            self.has_header, self._first = False, header
            header = [f"column_{number}" for number in range(1, len(header) + 1)]
        self.header = header
        if len(set(header)) < len(header):
            twice = next(column for column in header if header.count(column) > 1)
            raise UserError(f"the column '{twice}' appears twice", where=f"{name}, line 1", hint="rename one")

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        """The number of each row, from 1, and its cells."""
        if self._first is not None:
            self._count += 1
            yield self._count, self._first
        while (cells := self._next()) is not None:
            if not cells:
                continue
            self._count += 1
            if len(cells) != len(self.header):
                first = "header" if self.has_header else "first row"
                what = f"row {self._count} has {len(cells)} cells, the {first} has {len(self.header)}"
                where = f"{self._name}, row {self._count} (ends in line {self._reader.line_num})"
                hint = f"put cells that hold a {_DELIMITERS[self._delimiter]} in quotes"
                error = BadRowError(what, reason="another number of cells", where=where, hint=hint)
                if self._on_bad is None:
                    raise error
                self._on_bad(error, cells)
                continue
            yield self._count, cells

    @property
    def line(self) -> int:
        """The line in which the present row begins."""
        return self._text.first

    def _next(self) -> list[str] | None:
        """The cells of the next row; None at the end."""
        self._text.begin_row()
        where = f"{self._name}, row {self._count + 1}"
        try:
            return next(self._reader, None)
        except csv.Error as error:
            what, hint = f"the table cannot be read: {error}", 'a quote inside a quoted cell is written twice: ""'
            raise UserError(what, where=f"{where} (line {self._reader.line_num})", hint=hint) from error
        except _LongRow:
            where += f" (lines {self._text.first} to {self._text.number})"
            hint = "a quote that is never closed joins all lines that follow it"
            long = too_long(f"row {self._count + 1}", self._text.max_bytes, where=where, hint=hint)
            raise long.of_file() from None


class _LongRow(Exception):
    """A row of a table has more characters than it may have."""


class _Lines:
    """The lines of a file as text, with their ends; also those that end in a carriage return alone.

    Attributes:
        number: lines so far. first: the first line of the row that is being read.
    """

    def __init__(self, file: IO[bytes], name: str, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.number = 0
        self.first = 1
        self._text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        self._name = name
        self._left = max_bytes

    def begin_row(self) -> None:
        self.first = self.number + 1
        self._left = self.max_bytes

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = self._text.readline(self._left + 1)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._name, self.number + 1).of_file() from error
        if not line:
            raise StopIteration
        self.number += 1
        self._left -= len(line)
        if self._left < 0:
            raise _LongRow
        return line


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


# The objects of a JSON list, one after another: of the text only what is being parsed is in memory.
#
# It knows one list; not what its objects mean.


_CHARACTERS = 2**18
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this close to the end of the text so far may come from what has not been read yet: the longest
# literal, -Infinity, has nine characters.
_LITERAL = 16


def read_json(file: IO[bytes], name: str, *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[tuple[int, Row, int]]:
    """Number, object and characters of each object of a JSON list; none where the file is blank.

    Args:
        max_bytes: the most characters of an object.

    Raises:
        UserError: it is no JSON list of objects, or an object is too long; names the row.
    """
    text = _Text(file, name, max_bytes)
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
            what = f"row {number} is not an object but a {type(row).__name__}"
            raise UserError(what, where=f"{name}, row {number}", hint='every row is an object, such as {"text": "…"}')
        yield number, row, size
        after = text.peek()
        if after == "]":
            break
        if after != ",":
            raise text.error("Expecting ',' delimiter", f"{name}, row {number}", text.at)
        text.step()
    text.step()
    if text.peek():
        raise text.error("Extra data", name, text.at)


def object_lines(file: IO[bytes], name: str, *, max_bytes: int = MAX_ROW_BYTES) -> Iterator[tuple[int, int]]:
    """Yield the number of each object of a JSON list, and the line in which it begins."""
    text, number = _Text(file, name, max_bytes), 0
    while text.peek() in tuple("[,"):
        text.step()
        text.peek()
        number += 1
        yield number, text.line(text.at)
        text.value(f"row {number}", name)


class _Text:
    """The text of a file from ``at`` on, of which more is read when it is needed.

    Attributes:
        text: what was read and may still be needed. at: the place in it that is next.
    """

    def __init__(self, file: IO[bytes], name: str, max_bytes: int) -> None:
        self.text = ""
        self.at = 0
        self._file, self._name, self._most = file, name, max_bytes
        self._bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._line = 1  # in which the text begins
        self._read_lines = 1  # in which what is read next begins

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def step(self) -> None:
        """Pass over one character."""
        self.at += 1

    def value(self, what: str, where: str) -> tuple[object, int]:
        """The value that begins here, and its characters.

        Args:
            what, where: as in :func:`deltaw.data.report.too_long`.
        """
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
                if end - self.at > LEVELS:
                    check_levels(value)
            except json.JSONDecodeError as error:
                whole = error.pos < len(self.text) - _LITERAL and not error.msg.startswith("Unterminated")
                if whole or (len(self.text) - self.at <= self._most and not self._more()):
                    raise self.error(error.msg, where, error.pos) from error
                if len(self.text) - self.at > self._most:
                    raise too_long(what, self._most, where=where).of_file() from None
                continue
            except RecursionError:
                raise self.error(f"it has more than {LEVELS} levels", where, self.at) from None
            except ValueError as error:  # too many digits or levels
                raise self.error(str(error), where, self.at) from error
            size = end - self.at
            if size > self._most:
                raise too_long(what, self._most, where=where).of_file()
            self.at = end
            return value, size

    def error(self, said: str, where: str, at: int) -> UserError:
        """Text that is no JSON at place ``at``."""
        return UserError(f"the file is not JSON: {said}", where=f"{where} (line {self.line(at)})")

    def line(self, at: int) -> int:
        """Return the line of a place in the text."""
        return self._line + self.text.count("\n", 0, at)

    def _more(self) -> bool:
        """Read on, as much again as there is, so that what is long is not parsed often; False at the end."""
        self._line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        wanted = max(_CHARACTERS, min(len(self.text), self._most + 1 - len(self.text)))
        while data := self._file.read(wanted):
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


def _no_list(text: _Text, name: str) -> UserError:
    """The error for a file that is not a list: what it is instead."""
    value, _ = text.value("the file is not a list of objects, and its first value", name)
    if isinstance(value, dict) and text.peek():
        return UserError("the file is not a list of objects", where=name, hint="if each line is one, name it .jsonl")
    inside = [key for key, found in value.items() if isinstance(found, list)] if isinstance(value, dict) else []
    hint = f"; extract the list under '{inside[0]}'" if inside else ""
    return UserError("the file is not a list of objects", where=name, hint="it must be [{…}, {…}]" + hint)
