"""Progress of an experiment: one line for each finished step, with elapsed and estimated remaining time."""

from __future__ import annotations

import time

from deltaw.experiments.comparison import duration
from deltaw.training.callbacks import Say

# Starting the first process takes long, so no estimate is shown before this fraction of the rest is done.
ENOUGH = 0.1


class Pace:
    """Counts finished work, in units of one whole training.

    Args:
        left: the work that remains at the start.
    """

    def __init__(self, say: Say, left: float) -> None:
        self._say = say
        self._left = left
        self._done = 0.0
        self._begun = self._last = time.monotonic()

    def more(self, work: float) -> None:
        """Add work to what remains; a negative number removes some."""
        self._left += work

    def did(self, what: str, work: float) -> None:
        """Report that a step is finished."""
        now = time.monotonic()
        self._done += work
        self._left = max(0.0, self._left - work)
        left = ""
        if self._left > 1e-9 and self._done > ENOUGH * self._left:
            left = f", about {duration((now - self._begun) / self._done * self._left)} left"
        took = duration(now - self._last)
        self._say(f"{what}  [{took}; {duration(now - self._begun)} so far{left}]")
        self._last = now
