"""How far a study has come: one line a piece of work, with the time that went by and what is left."""

from __future__ import annotations

import time

from deltaw.experiments.comparison import duration
from deltaw.training.callbacks import Say

# The start of the first process says little about the rest: no guess before this part of what is left.
ENOUGH = 0.1


class Pace:
    """Counts work done, in units of one whole training.

    Args:
        left: all the work that is to be done now.
    """

    def __init__(self, say: Say, left: float) -> None:
        self._say = say
        self._left = left
        self._done = 0.0
        self._begun = self._last = time.monotonic()

    def more(self, work: float) -> None:
        """Work that has come up; negative where some need not be done."""
        self._left += work

    def did(self, what: str, work: float) -> None:
        """A piece is done: say so."""
        now = time.monotonic()
        self._done += work
        self._left = max(0.0, self._left - work)
        left = ""
        if self._left > 1e-9 and self._done > ENOUGH * self._left:
            left = f", about {duration((now - self._begun) / self._done * self._left)} left"
        took = duration(now - self._last)
        self._say(f"{what}  [{took}; {duration(now - self._begun)} so far{left}]")
        self._last = now
