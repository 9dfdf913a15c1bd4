"""JSON values with a limited nesting depth."""

from __future__ import annotations

import json

# Maximum nesting depth, which allows later code to use recursion. Rows with tools have about a dozen levels.
LEVELS = 100


def parse(text: str) -> object:
    """Parse a JSON text.

    Raises:
        ValueError: if the text is not JSON, has more than :data:`LEVELS` levels, or contains a number with too many
            digits.
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
