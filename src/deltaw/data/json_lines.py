"""Reader of JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO

from deltaw.data.bad_rows import BadRowError, OnBad, too_long_error
from deltaw.data.compressed_files import BLOCK_BYTES
from deltaw.data.json_values import parse
from deltaw.data.rows import Row
from deltaw.settings.data import MAX_ROW_BYTES


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
        while size > max_bytes and not line.endswith(b"\n") and (line := file.readline(BLOCK_BYTES)):
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
