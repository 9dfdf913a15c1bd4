"""A training that ends by itself: at a constant rate until its validation loss flattens, then cooled down.

After the warm-up the learning rate is constant, and the validation rows are evaluated every so often. When
the loss has flattened (:mod:`deltaw.experiments.until_flat`), or what remains of the budget is needed to cool
down, the parameters return to the best point so far, and the rate falls linearly to zero over a fifth of
the steps made. This warm-up, constant rate and cooldown reach what a schedule planned for the same number of
steps reaches (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", arXiv 2405.18392), and the number need not be known before. In the end the parameters are those
of the lowest validation loss of all.

It knows a session and numbers; no folders, seeds or other methods.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.experiments.comparison import duration
from deltaw.experiments.folder import Budget
from deltaw.training.callbacks import Say
from deltaw.training.optimizer import Schedule, warmup_steps
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState

# The trained parameters at the best point of a training, kept in a temporary file.
#
# In memory they would count among what the training needs: for full fine-tuning, four bytes more for each
# parameter. Nothing is serialized: the file holds the numbers as they are, and lives as long as the object.


class BestPoint:
    """A copy of parameters on disk; a context manager.

    Attributes:
        step, loss: where it was taken, and the validation loss there; step 0 before the first.
    """

    def __init__(self) -> None:
        self.step = 0
        self.loss = float("inf")
        self._file: Any = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self._dtypes: list[torch.dtype] = []

    def __enter__(self) -> BestPoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @torch.no_grad()
    def take(self, step: int, loss: float, parameters: Sequence[Tensor]) -> None:
        """Keep these in place of what was kept before."""
        self._file.seek(0)
        for parameter in parameters:
            flat = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            self._file.write(flat.numpy().data)
        self._file.truncate()
        self._dtypes = [parameter.dtype for parameter in parameters]
        self.step, self.loss = step, loss

    @torch.no_grad()
    def put_back(self, parameters: Sequence[Tensor]) -> None:
        """Copy what was kept into parameters of the same shapes, rounded to their types, one at a time."""
        self._file.seek(0)
        for parameter, dtype in zip(parameters, self._dtypes, strict=True):
            if not parameter.numel():
                continue
            buffer = np.empty(parameter.numel() * dtype.itemsize, dtype=np.uint8)
            self._file.readinto(buffer.data)
            parameter.copy_(torch.from_numpy(buffer).view(dtype).reshape(parameter.shape))


# When a training has flattened: a rule on its validation losses.
#
# A training has flattened if its second half brought next to nothing: the best validation loss of the later
# half of its evaluations is not at least 1 % below the best of the earlier half. In other words, training
# twice as long lowered the loss by less than 1 %. Once the loss is small, a thousandth of the untrained model's
# counts as nothing too: a loss that approaches zero falls by some share for ever. A training whose loss is
# still near that of the untrained model has not begun to learn, and is not called flat: soft prompts and biases
# stay there for epochs before they fall.
#
# The rule has no fixed patience, since a loss may stay where it is for a while before it falls: the longer a
# training has gone on, the longer it is waited for. It is applied at a constant learning rate. A rate that
# decays to zero ends every descent, whether there is more to learn or not.
#
# It knows numbers alone.
# By how much the later half must be lower for the training to go on: a share of the best loss of the earlier
# half, and one of the untrained model's loss.
TOLERANCE, OF_UNTRAINED = 0.01, 0.001
# The share of the untrained model's loss below which a training has begun to learn.
BEGUN = 0.85
# Evaluations below which nothing is called flat.
FEWEST = 8
# Evaluations of an epoch, and at least of a budget, that are planned.
OF_EPOCH, OF_BUDGET = 4, 10


def has_flattened(losses: Sequence[float], untrained: float) -> bool:
    """Whether a training has flattened.

    Args:
        losses: validation losses, evenly spaced. untrained: that before the first step.
    """
    if len(losses) < FEWEST or min(losses) > BEGUN * abs(untrained):
        return False
    half = len(losses) // 2
    earlier, later = min(losses[:half]), min(losses[half:])
    return later >= earlier - max(TOLERANCE * abs(earlier), OF_UNTRAINED * abs(untrained))


def steps_between(steps_per_epoch: int, steps: int | None) -> int:
    """Steps from one evaluation to the next: a quarter of an epoch, or a tenth of a budget of ``steps`` if
    that is less."""
    apart = steps_per_epoch / OF_EPOCH
    return max(1, int(apart if steps is None else min(apart, steps / OF_BUDGET)))


# Progress of an experiment: one line for each finished step, with elapsed and estimated remaining time.


# Starting the first process takes long, so no estimate is shown before this fraction of the rest is done.
ENOUGH = 0.1


class Pace:
    """Counts finished work, in units of one whole training.

    Args:
        left: the work that remains at the start.
    """

    def __init__(self, say: Say, left: float) -> None:
        self._say, self._left = say, left
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


# Steps of the cooldown, as a share of those before it.
COOLDOWN = 0.2
# Steps of a training that only time ends.
ENDLESS = 2**40


@dataclass(frozen=True)
class Cooldown(Schedule):
    """A constant rate up to step ``begin``, which falls linearly to zero from there."""

    begin: int = 0

    def rate(self, step: int) -> float:
        if step < self.begin:
            return super().rate(step)
        return self.learning_rate * (self.total_steps - step) / (self.total_steps - self.begin + 1)


@dataclass
class Curve:
    """What a training came to.

    Attributes:
        points: step and validation loss of each evaluation, step 0 for the untrained model.
        flattened: whether the loss flattened before the budget ended.
        best_step, best_loss: of the lowest validation loss; the trained parameters are those.
        outcome: sums over all steps.
    """

    points: list[tuple[int, float]] = field(default_factory=list)
    flattened: bool = False
    best_step: int = 0
    best_loss: float = math.inf
    outcome: Outcome = field(default_factory=Outcome)


def validation_loss(session: Session, rows: Sequence[Any]) -> float:
    """The loss of validation rows, or what takes its place: the negative reward; call within ``session.running``."""
    metrics = session.evaluate(rows).metrics
    if "reward" in metrics:
        return -metrics["reward"]
    return metrics["loss"] if "loss" in metrics else metrics["mse"]


def until_flat(
    session: Session,
    rows: Sequence[Any],
    validation: Sequence[Any],
    *,
    rate: float,
    budget: Budget,
    on_step: Callable[[Step], None] = lambda step: None,
    on_validation: Callable[[int, float], None] = lambda step, loss: None,
) -> Curve:
    """Train until the validation loss flattens or the budget ends; call within ``session.running``.

    Args:
        rows, validation: to train on, and to evaluate every ``train.eval_every`` steps, by default as
            :func:`deltaw.experiments.until_flat.steps_between` plans.
        rate: the constant learning rate.
        on_step, on_validation: told of each step, and of each validation loss.

    Raises:
        UserError: training diverged; the parameters are those before that step.
    """
    with BestPoint() as best:
        training = _Training(session, rows, validation, rate, budget, best, on_validation)

        def step_done(step: Step) -> None:
            on_step(step)
            training.after(step.step)

        how: dict[str, Any] = {"total_steps": training.most, "learning_rate": rate, "rows": rows}
        outcome = session.train(on_begin=training.begin, on_step=step_done, **how)
        curve = training.curve
        curve.outcome, curve.best_step, curve.best_loss = outcome, best.step, best.loss
        if not outcome.interrupted and best.step != outcome.steps:
            best.put_back([parameter for _, parameter in session.trained])
            session.method.after_step(session.model)
    return curve


@dataclass
class _Training:
    """Decides, after each step, whether to evaluate and whether to cool down."""

    session: Session
    rows: Sequence[Any]
    validation: Sequence[Any]
    rate: float
    budget: Budget
    best: BestPoint
    on_validation: Callable[[int, float], None]
    curve: Curve = field(default_factory=Curve)
    cooling: bool = False
    began: float = 0.0
    _state: TrainState | None = None

    def __post_init__(self) -> None:
        settings, steps = self.session.config.train, self.budget.steps
        self.most = steps or ENDLESS
        per_epoch = math.ceil(len(self.rows) / settings.batch_size)
        self.every = settings.eval_every or steps_between(per_epoch, steps)
        # A share means one of the budget's steps, and of an epoch's where only time is limited.
        self.warmup = warmup_steps(settings.warmup, steps or per_epoch)
        self.last = self.most if self.most < 3 else math.floor(self.most / (1 + COOLDOWN))

    def begin(self, state: TrainState) -> None:
        self._state = state
        state.schedule = Schedule("constant", self.rate, self.most, self.warmup)
        self.curve.points.append((0, validation_loss(self.session, self.validation)))
        self.began = time.monotonic()

    def after(self, step: int) -> None:
        """What follows step number ``step``."""
        assert self._state is not None
        if self.cooling:
            if step == self._state.total_steps:
                self._evaluate(step)
            return
        seconds, flat = self.budget.seconds, False
        over = seconds is not None and (time.monotonic() - self.began) * (1 + COOLDOWN) >= seconds
        ended = step >= self.last or over
        if step % self.every == 0 or ended:
            self._evaluate(step)
            untrained, *losses = (loss for _, loss in self.curve.points)
            flat = has_flattened(losses, untrained)
        if flat or ended:
            self.curve.flattened = flat
            self._cool_down(step)

    def _evaluate(self, step: int) -> None:
        loss = validation_loss(self.session, self.validation)
        self.curve.points.append((step, loss))
        assert self._state is not None
        if loss < self.best.loss:
            self.best.take(step, loss, self._state.trained)
        self.on_validation(step, loss)

    @torch.no_grad()
    def _cool_down(self, step: int) -> None:
        """Return to the best point, and let the rate fall to zero from the next step on."""
        state = self._state
        assert state is not None
        more = min(max(1, round(COOLDOWN * step)), self.most - step)
        state.schedule = Cooldown("constant", self.rate, step + more, self.warmup, begin=step)
        self.cooling = True
        if self.best.step == step or more == 0:
            return
        self.best.put_back(state.trained)
        for (_, parameter), master in zip(self.session.trained, state.trained, strict=True):
            if parameter is not master:
                parameter.copy_(master)  # rounded
        self.session.method.after_step(self.session.model)
