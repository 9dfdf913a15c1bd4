"""Train with a warmup-stable-decay schedule of automatic length.

After the warmup, the learning rate is constant and the validation rows are evaluated at intervals. The cooldown starts
when the loss has flattened (:func:`has_flattened`) or the remaining budget is needed for it. The parameters return to
the best point so far, and the rate decays linearly to zero over a fifth of the completed steps. The final parameters
are those with the lowest validation loss.

This reaches the loss of a schedule planned for the same number of steps, which need not be known in advance (Hägele et
al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", arXiv 2405.18392).
"""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.experiments.comparison import duration
from deltaw.experiments.flattening import has_flattened
from deltaw.experiments.folder import Budget
from deltaw.progress import LogFunction
from deltaw.runs.folder import LOSSES
from deltaw.training.optimizer import Schedule, warmup_steps
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState

# The parameters of the best point are stored in a temporary file as raw bytes. In memory, they would add four bytes per
# parameter to the peak of a full fine-tuning.


class BestPoint(contextlib.AbstractContextManager["BestPoint"]):
    """Copy of parameters on disk. A context manager.

    Attributes:
        step: Step of the copy, 0 before the first one.
        loss: Validation loss at this step.
    """

    def __init__(self) -> None:
        self.step = 0
        self.loss = math.inf
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._dtypes: list[torch.dtype] = []

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @torch.no_grad()
    def store_point(self, step: int, loss: float, parameters: Sequence[Tensor]) -> None:
        """Replace the stored parameters."""
        self._file.seek(0)
        for parameter in parameters:
            self._file.write(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._file.truncate()
        self._dtypes = [parameter.dtype for parameter in parameters]
        self.step = step
        self.loss = loss

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Copy the stored values into parameters of the same shapes, rounded to their types, one at a time."""
        self._file.seek(0)
        for parameter, dtype in zip(parameters, self._dtypes, strict=True):
            if parameter.numel():
                buffer = np.empty(parameter.numel() * dtype.itemsize, dtype=np.uint8)
                self._file.readinto(buffer.data)
                parameter.copy_(torch.from_numpy(buffer).view(dtype).reshape(parameter.shape))


# Planned number of evaluations per epoch, and minimum number per budget.
EVALUATIONS_PER_EPOCH = 4
EVALUATIONS_PER_BUDGET = 10


def steps_between(steps_per_epoch: int, steps: int | None) -> int:
    """Return the steps between evaluations: a quarter of an epoch, but at most a tenth of ``steps``."""
    interval = steps_per_epoch / EVALUATIONS_PER_EPOCH
    return max(1, int(interval if steps is None else min(interval, steps / EVALUATIONS_PER_BUDGET)))


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
    metrics = session.evaluate(rows).metrics
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
    on_step: Callable[[Step], None] = lambda step: None,
    on_validation: Callable[[int, float], None] = lambda step, loss: None,
) -> TrainingCurve:
    """Train until the validation loss flattens or the budget ends. Call this within ``session.running``.

    Args:
        rows: Training rows.
        validation: Validation rows, evaluated every ``train.eval_every`` steps, or at the interval of
            :func:`steps_between` by default.
        rate: Constant learning rate.
        on_step: Called after each step.
        on_validation: Called with the step and each validation loss.

    Raises:
        UserError: If training diverged. The parameters are those before that step.
    """
    with BestPoint() as best:
        training = _Training(session, rows, validation, rate, budget, best, on_validation)

        def step_done(step: Step) -> None:
            on_step(step)
            training.after_step(step.step)

        options: dict[str, Any] = {"total_steps": training.max_steps, "learning_rate": rate, "rows": rows}
        outcome = session.train(on_begin=training.start, on_step=step_done, **options)
        curve = training.curve
        curve.outcome = outcome
        curve.best_step = best.step
        curve.best_loss = best.loss
        if not outcome.interrupted and best.step != outcome.steps:
            best.restore([parameter for _, parameter in session.trainable_parameters])
            session.method.after_step(session.model)
    return curve


@dataclass
class _Training:
    """Decides after each step whether to evaluate and whether to start the cooldown."""

    session: Session
    rows: Sequence[Any]
    validation: Sequence[Any]
    rate: float
    budget: Budget
    best: BestPoint
    on_validation: Callable[[int, float], None]
    curve: TrainingCurve = field(default_factory=TrainingCurve)
    cooling: bool = False
    start_time: float = 0.0
    _state: TrainState | None = None

    def __post_init__(self) -> None:
        settings = self.session.config.train
        steps = self.budget.steps
        self.max_steps = steps or UNLIMITED_STEPS
        per_epoch = math.ceil(len(self.rows) / settings.batch_size)
        self.every = settings.eval_every or steps_between(per_epoch, steps)
        # A share refers to the steps of the budget, or of an epoch if only the time is limited.
        self.warmup = warmup_steps(settings.warmup, steps or per_epoch)
        self.last = self.max_steps if self.max_steps < 3 else math.floor(self.max_steps / (1 + COOLDOWN))

    def start(self, state: TrainState) -> None:
        self._state = state
        state.schedule = Schedule("constant", self.rate, self.max_steps, self.warmup)
        self.curve.points.append((0, validation_loss(self.session, self.validation)))
        self.start_time = time.monotonic()

    def after_step(self, step: int) -> None:
        """Evaluate or start the cooldown after a step."""
        assert self._state is not None
        if self.cooling:
            if step == self._state.total_steps:
                self._evaluate(step)
            return
        seconds = self.budget.seconds
        flat = False
        time_is_up = seconds is not None and (time.monotonic() - self.start_time) * (1 + COOLDOWN) >= seconds
        is_last = step >= self.last or time_is_up
        if step % self.every == 0 or is_last:
            self._evaluate(step)
            untrained, *losses = (loss for _, loss in self.curve.points)
            flat = has_flattened(losses, untrained)
        if flat or is_last:
            self.curve.flattened = flat
            self._cool_down(step)

    def _evaluate(self, step: int) -> None:
        loss = validation_loss(self.session, self.validation)
        self.curve.points.append((step, loss))
        assert self._state is not None
        if loss < self.best.loss:
            self.best.store_point(step, loss, self._state.trained)
        self.on_validation(step, loss)

    @torch.no_grad()
    def _cool_down(self, step: int) -> None:
        """Return to the best point and start the cooldown."""
        state = self._state
        assert state is not None
        num_steps = min(max(1, round(COOLDOWN * step)), self.max_steps - step)
        state.schedule = Cooldown("constant", self.rate, step + num_steps, self.warmup, cooldown_start=step)
        self.cooling = True
        if self.best.step == step or num_steps == 0:
            return
        self.best.restore(state.trained)
        for (_, parameter), master in zip(self.session.trainable_parameters, state.trained, strict=True):
            if parameter is not master:
                parameter.copy_(master)  # rounds to the parameter's type
        self.session.method.after_step(self.session.model)
