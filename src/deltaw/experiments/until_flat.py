"""A training that ends by itself: at a constant rate until its validation loss flattens, then cooled down.

After the warm-up the learning rate is constant, and the validation rows are evaluated every so often. When
the loss has flattened (:mod:`deltaw.experiments.plateau`), or what remains of the budget is needed to cool
down, the parameters return to the best point so far, and the rate falls linearly to zero over a fifth of
the steps made. This warm-up, constant rate and cooldown reach what a schedule planned for the same number of
steps reaches (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations", arXiv 2405.18392), and the number need not be known before. In the end the parameters are those
of the lowest validation loss of all.

It knows a session and numbers; no folders, seeds or other methods.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.experiments.best_point import BestPoint
from deltaw.experiments.budget import Budget
from deltaw.experiments.plateau import has_flattened, steps_between
from deltaw.training.optimizer import Schedule, warmup_steps
from deltaw.training.session import Session
from deltaw.training.state import Outcome, Step, TrainState

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
            :func:`deltaw.experiments.plateau.steps_between` plans.
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

        outcome = session.train(
            on_begin=training.begin,
            on_step=step_done,
            total_steps=training.most,
            learning_rate=rate,
            rows=rows,
        )
        curve = training.curve
        curve.outcome, curve.best_step, curve.best_loss = outcome, best.step, best.loss
        if not outcome.interrupted and best.step != outcome.steps:
            best.put_back([parameter for _, parameter in session.trained])
            session.method.after_step(session.model)
    return curve


class _Training:
    """Decides, after each step, whether to evaluate and whether to cool down."""

    def __init__(
        self,
        session: Session,
        rows: Sequence[Any],
        validation: Sequence[Any],
        rate: float,
        budget: Budget,
        best: BestPoint,
        on_validation: Callable[[int, float], None],
    ) -> None:
        settings = session.config.train
        self.session, self.validation, self.budget = session, validation, budget
        self.rate, self.best, self.on_validation = rate, best, on_validation
        self.curve = Curve()
        self.most = budget.steps or ENDLESS
        per_epoch = math.ceil(len(rows) / settings.batch_size)
        self.every = settings.eval_every or steps_between(per_epoch, budget.steps)
        # A share means one of the budget's steps, and of an epoch's where only time is limited.
        self.warmup = warmup_steps(settings.warmup, budget.steps or per_epoch)
        self.last = self.most if self.most < 3 else math.floor(self.most / (1 + COOLDOWN))
        self.cooling = False
        self.began = time.monotonic()
        self._state: TrainState | None = None

    def begin(self, state: TrainState) -> None:
        self._state = state
        state.schedule = Schedule("constant", self.rate, self.most, self.warmup)
        self.curve.points.append((0, self._validated()))
        self.began = time.monotonic()

    def after(self, step: int) -> None:
        """What follows step number ``step``."""
        assert self._state is not None
        if self.cooling:
            if step == self._state.total_steps:
                self._evaluate(step)
            return
        flat, ended = False, self._budget_ends(step)
        if step % self.every == 0 or ended:
            self._evaluate(step)
            untrained, *losses = (loss for _, loss in self.curve.points)
            flat = has_flattened(losses, untrained)
        if flat or ended:
            self.curve.flattened = flat
            self._cool_down(step)

    def _budget_ends(self, step: int) -> bool:
        if step >= self.last:
            return True
        seconds = self.budget.seconds
        return seconds is not None and (time.monotonic() - self.began) * (1 + COOLDOWN) >= seconds

    def _evaluate(self, step: int) -> None:
        loss = self._validated()
        self.curve.points.append((step, loss))
        assert self._state is not None
        if loss < self.best.loss:
            self.best.take(step, loss, self._state.trained)
        self.on_validation(step, loss)

    def _validated(self) -> float:
        metrics = self.session.evaluate(self.validation).metrics
        return metrics["loss"] if "loss" in metrics else metrics["mse"]

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
        own = [parameter for _, parameter in self.session.trained]
        _copy_into(own, state.trained)
        self.session.method.after_step(self.session.model)


def _copy_into(parameters: Sequence[Tensor], trained: Sequence[Tensor]) -> None:
    """Round master weights into the parameters that they stand for."""
    for parameter, master in zip(parameters, trained, strict=True):
        if parameter is not master:
            parameter.copy_(master)
