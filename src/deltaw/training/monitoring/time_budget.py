"""A time budget for a run: how many steps fit, by the speed that it measures, and when to stop.

The first steps of a run are measured, and count. From then on the number of steps is planned so that the run,
with its evaluations and all that follows the last step, ends in time; it is planned anew where the speed
changes. Knows seconds and steps; not what a step or an evaluation does.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from deltaw.errors import UserError

# The first step of a process prepares what later ones use; it does not tell their speed.
UNMEASURED = 1
# Steps that are measured before the first plan; more of them, until this share of the budget is spent.
FEWEST, MOST, MEASURING_SHARE = 3, 16, 0.02
# The speed is that of so many last steps.
WINDOW = 64
# A plan is made anew where it misses by this share of the steps to come, by more standard errors of the speed
# than these, and by more than ``SLACK`` steps.
TOLERANCE, ERRORS, SLACK = 0.05, 3.0, 2
# Kept back of the whole budget, for what no estimate knows.
MARGIN = 0.02


def now() -> float:
    """The clock of a run: seconds from some point on."""
    return time.monotonic()


class Planned(Protocol):
    """What a budget needs of the state of a training."""

    @property
    def step(self) -> int: ...

    @property
    def total_steps(self) -> int: ...

    def replan(self, total_steps: int) -> None: ...


@dataclass
class Ending:
    """What comes beside the steps, in seconds.

    Attributes:
        evaluation: of one evaluation, with the answers that it writes; estimated until one is measured.
        after: all that follows the last step but the last evaluation: drift, saving.
        measured: whether an evaluation was measured.
    """

    evaluation: float = 0.0
    after: float = 0.0
    measured: bool = False


@dataclass
class TimeBudget:
    """Plans the number of steps of a training so that the run ends in time.

    Attributes:
        seconds: of the whole run, from ``began``.
        most_steps: the steps of the run if there were time enough.
        began: when the run began, by ``clock``.
        clock: gives the time in seconds.
        ending: what comes beside the steps.
        told: the text of the setting, for messages.
    """

    seconds: float
    most_steps: int
    began: float
    clock: Callable[[], float] = now
    ending: Ending = field(default_factory=Ending)
    told: str = ""
    _spent_before: float = 0.0  # by earlier processes of the same run
    _planned: bool = False
    _mark: float | None = None
    _durations: list[float] = field(default_factory=list)
    _skipped: int = 0
    _error_planned: float = 0.0

    def spent(self) -> float:
        """Seconds since the run began, those of earlier processes included."""
        return self._spent_before + self.clock() - self.began

    @property
    def planned(self) -> bool:
        """Whether the number of steps was planned already."""
        return self._planned

    def begin(self) -> None:
        """The first step of this process is about to begin.

        Raises:
            UserError: the time is over, and no step was ever done.
        """
        if self.spent() >= self.seconds and not self._spent_before:
            raise UserError(
                f"the time is over before the first step: {self.spent():.0f} s went into reading the model "
                "and the rows",
                where="train.time",
                hint="give more time",
            )
        self._mark = self.clock()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation, whose time tells that of the ones to come."""
        begun = self.clock()
        yield
        took = self.clock() - begun
        self.ending.evaluation = max(took, self.ending.evaluation) if self.ending.measured else took
        self.ending.measured = True

    def step_done(self) -> None:
        """Measure the step that has just ended."""
        at = self.clock()
        if self._mark is None:
            return
        if self._skipped < UNMEASURED:
            self._skipped += 1
        else:
            self._durations = [*self._durations, at - self._mark][-WINDOW:]

    def plan(self, state: Planned, every: int | None) -> str | None:
        """Plan the number of steps where that is due.

        Args:
            state: of the training, which is given the number of steps.
            every: steps between evaluations, if any.

        Returns:
            a line about a new plan.
        """
        return self._plan(state, every) if self._ready() else None

    def go_on(self) -> None:
        """All that follows a step is done; the next one begins."""
        self._mark = self.clock()

    def over(self, state: Planned) -> bool:
        """Whether another step would end too late."""
        if state.step == 0 or not self._durations:
            return self.spent() >= self.seconds
        return self._left() < self._step_seconds() / 2

    def state(self) -> dict[str, Any]:
        return {
            "spent": self.spent(),
            "planned": self._planned,
            "evaluation": self.ending.evaluation,
            "evaluation_measured": self.ending.measured,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._spent_before = float(state["spent"])
        self._planned = bool(state["planned"])
        self.ending.evaluation = float(state["evaluation"])
        self.ending.measured = bool(state["evaluation_measured"])

    def _ready(self) -> bool:
        measured = len(self._durations)
        if measured < FEWEST:
            return False
        return self._planned or measured >= MOST or sum(self._durations) >= MEASURING_SHARE * self.seconds

    def _step_seconds(self) -> float:
        return sum(self._durations) / len(self._durations)

    def _speed_error(self) -> float:
        """The standard error of the mean step, as a share of it."""
        times = self._durations
        return statistics.stdev(times) / math.sqrt(len(times)) / max(1e-9, statistics.fmean(times))

    def _left(self) -> float:
        """Seconds that are left for steps, and for evaluations between them."""
        kept = self.ending.evaluation + self.ending.after + MARGIN * self.seconds
        return self.seconds - self.spent() - kept

    def _plan(self, state: Planned, every: int | None) -> str | None:
        each = self._step_seconds() + (self.ending.evaluation / every if every else 0.0)
        fitting = max(0, math.floor(self._left() / each)) if each > 0 else self.most_steps
        total = min(self.most_steps, state.step + fitting)
        to_come = max(1, state.total_steps - state.step)
        off = abs(total - state.total_steps)
        error = self._speed_error()
        tolerance = max(TOLERANCE, ERRORS * math.hypot(error, self._error_planned))
        if self._planned and (off <= SLACK or off <= tolerance * to_come):
            return None
        again = self._planned
        self._planned, self._error_planned = True, error
        changed = total != state.total_steps
        state.replan(total)
        if again and not changed:
            return None
        what = "planned anew" if again else "planned"
        enough = " (all there are)" if total == self.most_steps else ""
        kept = self.ending.evaluation + self.ending.after
        return (
            f"time {self.told or f'{self.seconds:g}s'}: {total} steps {what}{enough}, at "
            f"{self._step_seconds():.3g} s a step, with {self.spent():.0f} s spent and {kept:.0f} s kept for "
            "what follows the last step"
        )
