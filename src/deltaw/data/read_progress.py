"""Progress lines of long reads."""

from __future__ import annotations

import time

from deltaw.progress import LogFunction

# Seconds until the first progress line.
FIRST_LINE_SECONDS = 3.0
# Limits on the interval between lines, which grows with elapsed time.
LINE_INTERVAL_SECONDS = 5.0
MAX_LINE_INTERVAL_SECONDS = 30.0


class ReadProgress:
    """Logs the progress of a long read at increasing intervals.

    Args:
        log: Receives the lines.
        action: Description of the work, for example ``"tokenizing data.jsonl"``.
        total: Total number of bytes, or 0 if unknown.
        rows: Total number of rows, if known.
        done: Rows that an earlier process finished.
    """

    def __init__(self, log: LogFunction, action: str, total: int, *, rows: int = 0, done: int = 0) -> None:
        self._rows = rows
        self._done = done
        self._log = log
        self._action = action
        self._total = total
        self._start = time.monotonic()
        self._next = self._start + FIRST_LINE_SECONDS

    @property
    def seconds(self) -> float:
        """Return the elapsed time."""
        return time.monotonic() - self._start

    def update(self, rows: int, position: int) -> None:
        """Log a line if the interval has elapsed.

        Args:
            rows: Number of rows read so far.
            position: Number of bytes read so far.
        """
        now = time.monotonic()
        if now < self._next:
            return
        seconds = now - self._start
        self._next = now + min(MAX_LINE_INTERVAL_SECONDS, max(LINE_INTERVAL_SECONDS, seconds / 10))
        line = f"{self._action}: {rows:,} rows"
        if position and self._total:
            rate = position / seconds
            remaining = max(0, self._total - position) / rate
            line += f", {format_bytes(position)} of {format_bytes(self._total)}, {rate / 1e6:.1f} MB/s"
            line += f", {format_duration(remaining)} left"
        else:
            rate = (rows - self._done) / seconds
            line += f" of {self._rows:,}" if self._rows else ""
            line += f", {rate:,.0f} rows/s" if rate >= 10 else f", {rate:.2g} rows/s"
            line += f", {format_duration((self._rows - rows) / rate)} left" if self._rows and rate else ""
        self._log(line)


def format_bytes(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def format_duration(seconds: float) -> str:
    """Format a duration."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
