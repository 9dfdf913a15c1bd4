"""Time of a run by part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class PartTimer:
    """Measures the time of a run by part. Time in a nested part counts only for the inner part."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time in this context to a part."""
        start = time.monotonic()
        nested_before = sum(self._seconds.values())
        try:
            yield
        finally:
            self.add(name, time.monotonic() - start - (sum(self._seconds.values()) - nested_before))

    def parts(self) -> dict[str, float]:
        """Return the seconds of each part so far. ``other`` is the remaining time."""
        other = time.monotonic() - self._began - sum(self._seconds.values())
        return {name: round(seconds, 3) for name, seconds in {**self._seconds, "other": max(other, 0.0)}.items()}
