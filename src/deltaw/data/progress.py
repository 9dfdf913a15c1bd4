"""Lines on how far a long reading is: rows, megabytes a second, time left.

It knows counts and the clock; not what is read or who is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable

# The first line comes after so many seconds, further ones so many seconds apart: more in a long reading.
FIRST, APART, MOST_APART = 3.0, 5.0, 30.0

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Tell nobody."""


class Progress:
    """Tells how far a reading is, now and then.

    Args:
        say: told the lines. what: what is done, as in ``"tokenizing data.jsonl"``.
        total: bytes that there are; 0 where they are not known.
    """

    def __init__(self, say: Say, what: str, total: int) -> None:
        self._say = say
        self._what = what
        self._total = total
        self._begun = time.monotonic()
        self._next = self._begun + FIRST

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def at(self, rows: int, position: int) -> None:
        """``rows`` and ``position`` bytes are done."""
        now = time.monotonic()
        if now < self._next:
            return
        seconds = now - self._begun
        self._next = now + min(MOST_APART, max(APART, seconds / 10))
        line = f"{self._what}: {rows:,} rows"
        if position and self._total:
            rate = position / seconds
            left = max(0, self._total - position) / rate
            line += f", {size(position)} of {size(self._total)}, {rate / 1e6:.1f} MB/s, {span(left)} left"
        else:
            line += f", {rows / seconds:,.0f} rows/s"
        self._say(line)


def size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def span(seconds: float) -> str:
    """A time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
