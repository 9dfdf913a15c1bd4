"""Train with a warmup-stable-decay schedule of automatic length.

After the warmup, the learning rate is constant and the validation rows are evaluated at intervals. The cooldown starts
when the loss has flattened (:func:`has_flattened`) or the remaining budget is needed for it. The parameters return to
the best point so far, and the rate decays linearly to zero over a fifth of the completed steps. The final parameters
are those with the lowest validation loss.

This reaches the loss of a schedule planned for the same number of steps, which need not be known in advance (Hägele et
al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", arXiv 2405.18392).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.experiments.flattening import has_flattened
from deltaw.experiments.folder import Budget
from deltaw.runs.folder import LOSSES
from deltaw.training.callbacks import Callback, Callbacks
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.monitoring.best import BestParameters
from deltaw.training.optimizer import Schedule, warmup_steps
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState

# Planned number of evaluations per epoch, and minimum number per budget.
EVALUATIONS_PER_EPOCH = 4
EVALUATIONS_PER_BUDGET = 10


def steps_between(steps_per_epoch: int, steps: int | None) -> int:
    """Return the steps between evaluations: a quarter of an epoch, but at most a tenth of ``steps``."""
    interval = steps_per_epoch / EVALUATIONS_PER_EPOCH
    return max(1, int(interval if steps is None else min(interval, steps / EVALUATIONS_PER_BUDGET)))


# Length of the cooldown as a share of the steps before it.
COOLDOWN = 0.2
# Planned steps of a training that is limited only by time.
UNLIMITED_STEPS = 2**40


@dataclass(frozen=True)
class Cooldown(Schedule):
    """Constant rate up to step ``cooldown_start``, followed by a linear decay to zero."""

    cooldown_start: int = 0

    def rate(self, step: int) -> float:
        if step < self.cooldown_start:
            return super().rate(step)
        return self.learning_rate * (self.total_steps - step) / (self.total_steps - self.cooldown_start + 1)


@dataclass
class TrainingCurve:
    """Result of a training with automatic length.

    Attributes:
        points: Step and validation loss of each evaluation. Step 0 is the untrained model.
        flattened: True if the loss flattened within the budget.
        best_step: Step of the lowest validation loss, with the final parameters.
        best_loss: Lowest validation loss.
        outcome: Totals over all steps.
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    flattened: bool = False
    best_step: int = 0
    best_loss: float = math.inf
    outcome: Outcome = field(default_factory=Outcome)


def validation_loss(session: Session, rows: Sequence[Any]) -> float:
    """Return the loss of validation rows, or the negative reward. Call this within ``session.running``."""
    return loss_of(session.evaluate(rows))


def loss_of(evaluation: Evaluation) -> float:
    """Return the loss of an evaluation, or its negative reward."""
    metrics = evaluation.metrics
    if "reward" in metrics:
        return -metrics["reward"]
    return next(metrics[name] for name in LOSSES if name in metrics)


def until_flat(
    session: Session,
    rows: Sequence[Any],
    validation: Sequence[Any],
    *,
    rate: float,
    budget: Budget,
    callback: Callback | None = None,
) -> TrainingCurve:
    """Train until the validation loss flattens or the budget ends. Call this within ``session.running``.

    Meanwhile, the best parameters are stored in ``best/`` of the folder ``output`` of the session's settings.

    Args:
        rows: Training rows.
        validation: Validation rows, evaluated every ``train.eval_every`` steps, or at the interval of
            :func:`steps_between` by default.
        rate: Constant learning rate.
        callback: Receives the training events, and each evaluation except for that of the untrained model.

    Raises:
        UserError: If training diverged. The parameters are those before that step.
    """
    callback = callback or Callback()
    best = BestParameters(session, Path(os.path.expanduser(session.config.output)))
    best.remove()  # those of a training that was killed
    try:
        schedule = FlatLossSchedule(session, rows, validation, rate, budget, best, callback)
        options: dict[str, Any] = {"total_steps": schedule.max_steps, "learning_rate": rate, "rows": rows}
        return schedule.finish(session.train(Callbacks(callback, schedule), **options))
    finally:
        best.remove()


@dataclass
class FlatLossSchedule(Callback):
    """Callback that ends a training when its validation loss has flattened.

    It sets the schedule of the training, evaluates the validation rows at intervals, and starts the cooldown.

    Attributes:
        best: Stores the best parameters on disk. In memory, they would take four bytes per parameter.
        callback: Receives the evaluations.
        curve: Result of the training so far.
        max_steps: Number of steps of the budget.
    """

    session: Session
    rows: Sequence[Any]
    validation: Sequence[Any]
    rate: float
    budget: Budget
    best: BestParameters
    callback: Callback
    curve: TrainingCurve = field(default_factory=TrainingCurve)
    _is_cooling: bool = False
    _start_time: float = 0.0

    def __post_init__(self) -> None:
        settings = self.session.config.train
        steps = self.budget.steps
        self.max_steps = steps or UNLIMITED_STEPS
        per_epoch = math.ceil(len(self.rows) / settings.batch_size)
        self._every = settings.eval_every or steps_between(per_epoch, steps)
        # A share refers to the steps of the budget, or of an epoch if only the time is limited.
        self._warmup = warmup_steps(settings.warmup, steps or per_epoch)
        self._cooldown_step = self.max_steps if self.max_steps < 3 else math.floor(self.max_steps / (1 + COOLDOWN))

    def on_begin(self, state: TrainState) -> None:
        self._state = state
        state.schedule = Schedule("constant", self.rate, self.max_steps, self._warmup)
        self.curve.points.append((0, validation_loss(self.session, self.validation)))
        self._start_time = time.monotonic()

    def on_step(self, step: Step) -> None:
        number = step.step
        if self._is_cooling:
            if number == self._state.total_steps:
                self._evaluate(number)
            return
        seconds = self.budget.seconds
        flat = False
        time_is_up = seconds is not None and (time.monotonic() - self._start_time) * (1 + COOLDOWN) >= seconds
        is_last = number >= self._cooldown_step or time_is_up
        if number % self._every == 0 or is_last:
            self._evaluate(number)
            untrained, *losses = (loss for _, loss in self.curve.points)
            flat = has_flattened(losses, untrained)
        if flat or is_last:
            self.curve.flattened = flat
            self._cool_down(number)

    def finish(self, outcome: Outcome) -> TrainingCurve:
        """Restore the best parameters, unless the training was interrupted, and return the curve."""
        curve = self.curve
        curve.outcome = outcome
        if not outcome.interrupted and curve.best_step != outcome.steps:
            self.best.restore(curve.best_step, self._state)
        return curve

    def _evaluate(self, step: int) -> None:
        evaluation = self.session.evaluate(self.validation)
        loss = loss_of(evaluation)
        curve = self.curve
        curve.points.append((step, loss))
        if loss < curve.best_loss:
            self.best.save(step, self._state)
            curve.best_step = step
            curve.best_loss = loss
        self.callback.on_evaluation(step, evaluation)

    def _cool_down(self, step: int) -> None:
        """Return to the best point and start the cooldown."""
        state = self._state
        num_steps = min(max(1, round(COOLDOWN * step)), self.max_steps - step)
        state.schedule = Cooldown("constant", self.rate, step + num_steps, self._warmup, cooldown_start=step)
        self._is_cooling = True
        if self.curve.best_step != step and num_steps:
            self.best.restore(self.curve.best_step, state)
