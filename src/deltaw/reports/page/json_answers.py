"""JSON answers for a page: pretty-printed lines, and their difference from the expected answer.

Answers are untrusted text. Whatever is too long, too deep or not strictly JSON is shown as plain text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

# Characters of an answer, and lines of a pretty-printed answer, that are compared.
LONGEST, MOST_LINES = 8_000, 400
# Characters that reorder or hide text, and surrogates, which no file in UTF-8 can hold.
_INVISIBLE = re.compile("[\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def pretty_json(text: str | None) -> list[str] | None:
    """Return the lines of a JSON object or list; None for any other text.

    Texts with a key twice or with numbers that JSON does not have, such as NaN, are not pretty-printed: the result
    would differ from the text.
    """
    if text is None or len(text) > LONGEST:
        return None
    try:
        value = json.loads(text, parse_constant=_refuse, object_pairs_hook=_unique)
        lines = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).split("\n")
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict | list) or len(lines) > MOST_LINES or sum(map(len, lines)) > 4 * LONGEST:
        return None
    return [_INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in lines]


def marked_lines(lines: Sequence[str], reference: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return each line with its mark: ``+`` if the reference lacks it, ``-`` for a line that only the reference has."""
    if reference is None:
        return [(" ", line) for line in lines]
    found: list[tuple[str, str]] = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, reference, lines, autojunk=False).get_opcodes():
        found += [("-", line) for line in reference[a:b] if kind != "equal"]
        found += [(" " if kind == "equal" else "+", line) for line in lines[c:d]]
    return found


def _refuse(value: str) -> Any:
    raise ValueError(f"{value} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return found
