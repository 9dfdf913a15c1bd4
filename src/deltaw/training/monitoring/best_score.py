"""Which evaluation was the best so far, and whether it has been too long since.

Knows steps and metrics; not models, files or how a run ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deltaw.host.choices import Choice
from deltaw.training.evaluation.base import Evaluation

# Evaluations over a run where nobody says how many: at most, and at least.
MOST, FEWEST = 10, 4
# So many training rows go between two evaluations for each row that is evaluated, where ``FEWEST`` allows.
ROWS_PER_HELD_OUT = 5


def deciding_metric(evaluation: Evaluation, *, writes_text: bool) -> tuple[str, bool]:
    """The metric that the best evaluation is chosen by, and whether higher is better.

    For a model that writes text it is the loss, which changes with every step; the share of exact answers
    moves in jumps of whole rows. Other tasks are decided by their main metric.
    """
    if writes_text and "loss" in evaluation.metrics:
        return "loss", False
    return evaluation.main, evaluation.higher_is_better


def decided(evaluation: Evaluation, *, writes_text: bool) -> Evaluation:
    """The evaluation with the deciding metric as its main one."""
    metric, higher = deciding_metric(evaluation, writes_text=writes_text)
    return replace(evaluation, main=metric, higher_is_better=higher)


def usual_eval_every(total_steps: int, batch_size: int, held_out: int) -> Choice[int]:
    """Steps between evaluations where the best one is asked for and ``train.eval_every`` is null."""
    often = math.ceil(total_steps / MOST)
    cheap = math.ceil(ROWS_PER_HELD_OUT * held_out / batch_size)
    every = max(1, min(max(often, cheap), math.ceil(total_steps / FEWEST)))
    return Choice(
        every, f"{FEWEST} to {MOST} evaluations over {total_steps} steps, for {held_out} held-out rows"
    )


@dataclass
class BestScore:
    """The best evaluation of a run so far.

    Attributes:
        patience: evaluations in a row without improvement after which a run is to stop; None for never.
        step, value: of the best one; None before the first. metric: that it was chosen by.
        waited: evaluations since without improvement.
    """

    patience: int | None = None
    step: int | None = None
    value: float | None = None
    metric: str = ""
    waited: int = 0

    def see(self, step: int, evaluation: Evaluation, *, writes_text: bool) -> bool:
        """Take note of an evaluation; whether it is the best so far.

        One that is equal to the best, or not a finite number, is no improvement.
        """
        metric, higher = deciding_metric(evaluation, writes_text=writes_text)
        value = evaluation.metrics.get(metric, math.nan)
        better = math.isfinite(value)
        if better and self.value is not None:
            better = value > self.value if higher else value < self.value
        if better:
            self.step, self.value, self.metric, self.waited = step, float(value), metric, 0
        else:
            self.waited += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether it has been too long since the best."""
        return self.patience is not None and self.waited >= self.patience

    def why(self) -> str:
        """Why a run stops here, for a person."""
        best = "" if self.step is None else f" since step {self.step} ({self.metric} {self.value:.4f})"
        times = "evaluation" if self.waited == 1 else "evaluations"
        return f"early stopping: no improvement in {self.waited} {times}{best}"

    def as_dict(self) -> dict[str, object] | None:
        """The best one, ready for JSON; None before the first."""
        if self.step is None:
            return None
        return {"step": self.step, "metric": self.metric, "value": self.value}

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "metric": self.metric, "waited": self.waited}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.value = state["step"], state["value"]
        self.metric, self.waited = state["metric"], state["waited"]
