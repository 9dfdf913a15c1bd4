"""Warnings from the numbers of the steps alone: gradients that jump, steps all clipped, a rising loss.

Every rule compares a run with itself: with the median and the spread of its own last steps. So none depends
on a model, a loss or a batch size. Knows steps; not who is told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.training.state import Step

# Steps that a rule looks back on, and that it needs before it says anything.
WINDOW, FEWEST = 100, 20
# A gradient norm is a jump where its logarithm is so many standard deviations above the median of the window
# (estimated by the median absolute deviation, which the jumps themselves do not move), and where it is so
# many times the largest norm of the window.
DEVIATIONS, TIMES_LARGEST = 8.0, 2.0
# 1 / the 75 % quantile of a normal distribution: makes the median absolute deviation a standard deviation.
OF_NORMAL = 1.4826
# The share of the window's steps that were clipped.
CLIPPED = 0.95
# The loss rises where the mean of the last steps is so many standard errors above the lowest mean of as many
# steps before, for as many steps in a row. The lowest of many means is low by chance alone, by up to three
# standard errors; this is twice that.
RISE_WINDOW, RISE_ERRORS = 50, 6.0


@dataclass(frozen=True)
class StepWarning:
    """Something about a run's steps that a person should know.

    Attributes:
        kind: ``gradient_norm``, ``clipped`` or ``rising_loss``. text: it in words.
        facts: the numbers behind it.
    """

    kind: str
    text: str
    facts: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {"kind": self.kind, **self.facts}


@dataclass
class StepWatch:
    """Looks at each step once it is done. Each kind of warning comes once in a run.

    Attributes:
        max_grad_norm: the norm that gradients are clipped to; None for never.
    """

    max_grad_norm: float | None
    _seen: int = 0
    _norms: list[float] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)
    _lowest: tuple[float, float] | None = None  # mean of the losses, and the squared error of that mean
    _risen: int = 0
    _said: list[str] = field(default_factory=list)

    def see(self, step: Step) -> list[StepWarning]:
        """The warnings after this step, which are mostly none."""
        found = []
        self._seen += 1
        if math.isfinite(step.gradient_norm) and step.gradient_norm > 0:
            found += [self._jump(step), self._clipped(step)]
        if math.isfinite(step.loss):
            found.append(self._rising(step))
        new = [warning for warning in found if warning is not None and warning.kind not in self._said]
        self._said += [warning.kind for warning in new]
        return new

    def state(self) -> dict[str, Any]:
        return {
            "seen": self._seen,
            "norms": list(self._norms),
            "losses": list(self._losses),
            "lowest": self._lowest,
            "risen": self._risen,
            "said": list(self._said),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._seen = state["seen"]
        self._norms, self._losses = list(state["norms"]), list(state["losses"])
        self._lowest = None if state["lowest"] is None else (state["lowest"][0], state["lowest"][1])
        self._risen, self._said = state["risen"], list(state["said"])

    def _jump(self, step: Step) -> StepWarning | None:
        """A norm far above those of the steps before."""
        before, norm = self._norms[-WINDOW:], step.gradient_norm
        self._norms = [*before, norm][-WINDOW:]
        if len(before) < FEWEST or norm < TIMES_LARGEST * max(before):
            return None
        median, spread = _median_and_spread([math.log(other) for other in before])
        if math.log(norm) < median + DEVIATIONS * spread:
            return None
        usual = math.exp(median)
        return StepWarning(
            "gradient_norm",
            f"step {step.step}: the gradient norm is {norm:.3g}, {norm / usual:.0f} times its median of the "
            f"last {len(before)} steps. Where that comes again, look at the rows of such a step, or lower "
            "train.learning_rate",
            {"value": norm, "median": usual},
        )

    def _clipped(self, step: Step) -> StepWarning | None:
        """Nearly all of the last steps were clipped, so that the limit sets the length of each."""
        limit, norms = self.max_grad_norm, self._norms
        if limit is None or self._seen < 2 * WINDOW:  # gradients are large at first in many trainings
            return None
        share = sum(norm > limit for norm in norms) / len(norms)
        if share < CLIPPED:
            return None
        median = statistics.median(norms)
        return StepWarning(
            "clipped",
            f"step {step.step}: {share:.0%} of the last {len(norms)} gradients were clipped to "
            f"train.max_grad_norm {limit:g}; their median norm is {median:.3g}. Steps with large gradients "
            f"weigh no more than others then; a limit of {_round_up(2 * median):g} clips only outliers",
            {"share": share, "median": median, "limit": limit},
        )

    def _rising(self, step: Step) -> StepWarning | None:
        """The mean of the last losses stays above the lowest mean before."""
        self._losses = [*self._losses, step.loss][-2 * RISE_WINDOW :]
        if len(self._losses) < 2 * RISE_WINDOW:
            return None
        earlier = _mean_and_error(self._losses[:RISE_WINDOW])
        if self._lowest is None or earlier[0] < self._lowest[0]:
            self._lowest = earlier
        now = _mean_and_error(self._losses[RISE_WINDOW:])
        error = math.sqrt(self._lowest[1] + now[1])
        rise = now[0] - self._lowest[0]
        self._risen = self._risen + 1 if rise > RISE_ERRORS * error and rise > 0 else 0
        if self._risen < RISE_WINDOW:
            return None
        return StepWarning(
            "rising_loss",
            f"step {step.step}: the training loss is rising: its mean of the last {RISE_WINDOW} steps is "
            f"{now[0]:.4f}, and was {self._lowest[0]:.4f} before. Lower train.learning_rate",
            {"value": now[0], "lowest": self._lowest[0]},
        )


def _median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Median, and the standard deviation that the median absolute deviation from it stands for."""
    median = statistics.median(values)
    return median, OF_NORMAL * statistics.median(abs(value - median) for value in values)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the squared standard error of it."""
    return statistics.fmean(values), statistics.variance(values) / len(values)


def _round_up(value: float) -> float:
    """To one digit, upwards."""
    power = 10.0 ** math.floor(math.log10(value))
    return round(math.ceil(value / power) * power, 10)
