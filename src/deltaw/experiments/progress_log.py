"""Progress of an experiment with its elapsed and estimated remaining time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import fmean

from deltaw.experiments.comparison import duration
from deltaw.progress import LogFunction

# Starting the first process takes long, so no estimate is shown before this fraction of the remaining work is done.
MIN_PROGRESS = 0.1


class ProgressLog:
    """Logs finished work with elapsed and estimated remaining time. The unit of work is one full training.

    Args:
        remaining: Work that remains at the start.

    Attributes:
        remaining: Remaining work.
    """

    def __init__(self, log: LogFunction, remaining: float) -> None:
        self._log = log
        self.remaining = remaining
        self._done = 0.0
        self._start = self._last = time.monotonic()

    def add_work(self, work: float) -> None:
        """Add work. A negative number removes work."""
        self.remaining += work

    def report_plan(self, seconds: Sequence[float]) -> None:
        """Log the predicted time of all work from the predicted seconds of one training with each method."""
        if seconds and self.remaining:
            total = self.remaining * fmean(seconds)
            longest = max(seconds)
            self._log(f"planned: at most {duration(longest)} per training, {duration(total)} for all")

    def report_done(self, message: str, work: float) -> None:
        """Log that a unit of work is finished."""
        now = time.monotonic()
        self._done += work
        self.remaining = max(0.0, self.remaining - work)
        estimate = ""
        if self.remaining > 1e-9 and self._done > MIN_PROGRESS * self.remaining:
            estimate = f", about {duration((now - self._start) / self._done * self.remaining)} left"
        self._log(f"{message}  [{duration(now - self._last)}; {duration(now - self._start)} so far{estimate}]")
        self._last = now
