"""The objects of a JSON list, one after another: of the text only what is being parsed is in memory.

It knows one list; not what its objects mean.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

from deltaw.data.bad_rows import MAX_ROW_BYTES, too_long
from deltaw.data.json_text import LEVELS, check_levels
from deltaw.data.row_files import not_utf8
from deltaw.data.rows import Row
from deltaw.errors import UserError

_BLOCK = 2**18
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this close to the end of the text so far may come from what has not been read yet: the longest
# literal, -Infinity, has nine characters.
_LITERAL = 16


def read_json(
    file: IO[bytes], name: str, *, max_bytes: int = MAX_ROW_BYTES
) -> Iterator[tuple[int, Row, int]]:
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
            raise UserError(
                f"row {number} is not an object but a {type(row).__name__}",
                where=f"{name}, row {number}",
                hint='every row is an object, such as {"text": "…"}',
            )
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
            what, where: as in :func:`deltaw.data.bad_rows.too_long`.
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
                    raise too_long(what, self._most, where=where) from None
                continue
            except RecursionError:
                raise self.error(f"it has more than {LEVELS} levels", where, self.at) from None
            except ValueError as error:  # too many digits or levels
                raise self.error(str(error), where, self.at) from error
            size = end - self.at
            if size > self._most:
                raise too_long(what, self._most, where=where)
            self.at = end
            return value, size

    def error(self, said: str, where: str, at: int) -> UserError:
        """Text that is no JSON at place ``at``."""
        line = self._line + self.text.count("\n", 0, at)
        return UserError(f"the file is not JSON: {said}", where=f"{where} (line {line})")

    def _more(self) -> bool:
        """Read on, as much again as there is, so that what is long is not parsed often; False at the end."""
        self._line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        wanted = max(_BLOCK, min(len(self.text), self._most + 1 - len(self.text)))
        while data := self._file.read(wanted):
            try:
                text = self._bytes.decode(data)
            except UnicodeDecodeError as error:
                raise not_utf8(error, self._name, self._read_lines) from error
            self._read_lines += text.count("\n")
            if text:
                self.text += text
                return True
        try:
            self._bytes.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self._name, self._read_lines) from error
        return False


def _no_list(text: _Text, name: str) -> UserError:
    """The error for a file that is not a list: what it is instead."""
    value, _ = text.value("the file is not a list of objects, and its first value", name)
    if isinstance(value, dict) and text.peek():
        return UserError(
            "the file is not a list of objects",
            where=name,
            hint="it looks like one object per line: name it .jsonl",
        )
    inside = (
        [key for key, found in value.items() if isinstance(found, list)] if isinstance(value, dict) else []
    )
    hint = f"; extract the list under '{inside[0]}'" if inside else ""
    return UserError("the file is not a list of objects", where=name, hint="it must be [{…}, {…}]" + hint)
