"""JSON from anywhere as values: a limit on its levels, so that whatever follows may use recursion."""

from __future__ import annotations

import json

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
                inner += [
                    v for v in (one.values() if isinstance(one, dict) else one) if isinstance(v, list | dict)
                ]
        if not inner:
            return
        level = inner
    raise ValueError(f"it has more than {LEVELS} levels")
