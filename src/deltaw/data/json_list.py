"""Incremental reader of a JSON list."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from deltaw.data.bad_rows import too_long_error
from deltaw.data.json_lines import not_utf8
from deltaw.data.json_values import LEVELS, check_levels
from deltaw.data.rows import Row
from deltaw.errors import UserError
from deltaw.settings.data import MAX_ROW_BYTES

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
            subject: See :func:`deltaw.data.bad_rows.too_long_error`.
            location: See :func:`deltaw.data.bad_rows.too_long_error`.
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
