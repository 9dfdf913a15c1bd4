"""Pretty-print JSON answers for a page, and compare them with the expected answer.

Answers are untrusted text. Text that is too long, too deep or not strictly JSON is shown unchanged.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

# Characters of an answer, and lines of a pretty-printed answer, that are compared.
MAX_LENGTH, MAX_LINES = 8_000, 400
# Characters that reorder or hide text, and surrogates, which cannot be encoded in UTF-8.
_INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def pretty_json(text: str | None) -> list[str] | None:
    """Return the lines of a JSON object or list, or None for any other text.

    Text with a duplicate key, or with a number such as NaN, is not pretty-printed, because the result would differ.
    """
    if text is None or len(text) > MAX_LENGTH:
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
        lines = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).split("\n")
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict | list) or len(lines) > MAX_LINES or sum(map(len, lines)) > 4 * MAX_LENGTH:
        return None
    return [_INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", line) for line in lines]


def marked_lines(lines: Sequence[str], reference: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return each line with a mark: ``+`` for an added line, ``-`` for a line of the reference that is missing."""
    if reference is None:
        return [(" ", line) for line in lines]
    marked: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, reference, lines, autojunk=False).get_opcodes():
        marked += [("-", line) for line in reference[a:b] if kind != "equal"]
        marked += [(" " if kind == "equal" else "+", line) for line in lines[c:d]]
    return marked


def _refuse(value: str) -> Any:
    raise ValueError(f"{value} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        raise ValueError("duplicate key")
    return unique
