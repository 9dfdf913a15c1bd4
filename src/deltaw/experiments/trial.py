"""A trial: a training that can be repeated from the same initialization and is evaluated on validation rows.

Learning rates and other settings are chosen by its validation loss. The validation rows are taken from the
training rows. The run's held-out rows are not used, so the final score is on rows that no choice depended on.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from deltaw.config import RunConfig
from deltaw.data.sequences import picked
from deltaw.errors import UserError
from deltaw.experiments.budget import Budget
from deltaw.experiments.until_flat import Curve, until_flat
from deltaw.training.callbacks import Say, silent
from deltaw.training.fit import load_for
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import Step
from deltaw.training.tasks.base import RunData, Task

VALIDATION_SHARE = 0.1
VALIDATION_ROWS = 256
_SPLITTING = 4  # selects a random stream of its own for the seed


class Stopped(Exception):
    """A training was stopped early, by its caller or by a signal."""


class Trial:
    """One run's model and rows, trained as often as needed.

    Args:
        config: the run's settings.
        say: told lines that a person may want to read.
        known: task and rows, if they have been read already.
        once: whether it is trained only once, so that no copy of the initialization is kept.

    Attributes:
        session: the training.
        task, data: what was read; another trial on the same rows can reuse them.
        training, validation: rows to train on, and rows to evaluate on.
        chosen: by dotted key, what was chosen without being told, and why.

    Raises:
        UserError: as for a run, or there are too few rows for a validation set.
    """

    def __init__(
        self,
        config: RunConfig,
        say: Say = silent,
        known: tuple[Task, RunData] | None = None,
        *,
        once: bool = False,
    ) -> None:
        # Features of frozen layers are computed once for all repetitions.
        self.config = with_features(config)
        self._say = say
        self._once = once
        self.task, self.data = known or read_data(self.config, say)
        self._spoilt = False
        self._open()

    def _open(self) -> None:
        loaded = load_for(self.config, self.task, self.data, self._say)
        self.session: Session = assemble(
            self.config,
            self.task,
            self.data,
            loaded.model,
            device=str(loaded.choices["device"].value),
            new_modules=loaded.new_modules,
            offered=() if loaded.kernels is None else loaded.kernels.approximations,
        )
        self.chosen = {**loaded.choices, **self.session.chosen}
        for line in [*self.session.said, *self.session.lines()]:
            self._say(line)
        self.training, self.validation = split_off(self.session.data.train, self.config.data_seed)
        self._start = [] if self._once else [p.detach().clone() for _, p in self._parameters()]

    def steps(self, share: float) -> int:
        """Number of steps that make up a share of the run's."""
        return max(1, math.ceil(share * self.session.total_steps))

    def loss(
        self,
        rate: float,
        steps: int,
        *,
        every: int | None = None,
        on_evaluation: Callable[[int, float], bool] | None = None,
    ) -> float:
        """The validation loss after a training from the initialization; infinite if it diverges.

        Args:
            rate: peak learning rate.
            steps: number of optimizer steps.
            every: also evaluate after every so many steps, and call ``on_evaluation`` with the number of
                the evaluation (from 1) and its loss.
            on_evaluation: returns whether to continue.

        Raises:
            Stopped: ``on_evaluation`` returned false, or a signal arrived.
        """
        if self._spoilt:
            self.close()
            self._open()
        self._spoilt = True
        self._restore()
        with self.session.running():

            def on_step(step: Step) -> None:
                if every is None or on_evaluation is None or step.step % every or step.step == steps:
                    return
                if not on_evaluation(step.step // every, self._validated()):
                    raise Stopped

            try:
                outcome = self.session.train(
                    on_step=on_step, total_steps=steps, learning_rate=rate, rows=self.training
                )
                if outcome.interrupted:
                    raise Stopped
                loss = self._validated()
            except UserError as error:
                self._say(f"learning rate {rate:g}: {error.what}")
                return math.inf
        self._spoilt = False
        return loss

    def until_flat(
        self,
        rate: float,
        budget: Budget,
        *,
        on_step: Callable[[Step], None] = lambda step: None,
        on_validation: Callable[[int, float], None] = lambda step, loss: None,
    ) -> Curve:
        """Train from the initialization until the validation loss flattens or the budget ends.

        Raises:
            UserError: training diverged.
            Stopped: a signal arrived.
        """
        if self._spoilt:
            self.close()
            self._open()
        self._spoilt = True
        self._restore()
        with self.session.running():
            curve = until_flat(
                self.session,
                self.training,
                self.validation,
                rate=rate,
                budget=budget,
                on_step=on_step,
                on_validation=on_validation,
            )
        if curve.outcome.interrupted:
            raise Stopped
        self._spoilt = False
        return curve

    def _validated(self) -> float:
        metrics = self.session.evaluate(self.validation).metrics
        return metrics["loss"] if "loss" in metrics else metrics["mse"]

    @torch.no_grad()
    def _restore(self) -> None:
        """Reset the trained parameters to those before the first step; the loop seeds itself."""
        if self._once:
            return
        for (_, parameter), start in zip(self._parameters(), self._start, strict=True):
            parameter.copy_(start)
            parameter.grad = None
        self.session.method.after_step(self.session.model)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.session.method.parameters(self.session.model))

    def close(self) -> None:
        """Release the model and the feature files."""
        if hasattr(self, "session"):
            self.session.close()
            del self.session, self._start
            gc.collect()


def with_features(config: RunConfig) -> RunConfig:
    """The settings with what frozen layers give kept, since every row is seen again."""
    train = config.train.model_copy(update={"keep_features": True})
    return config.model_copy(update={"train": train})


def split_off(rows: Sequence[Any], seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Rows to train on and validation rows: a tenth of the rows and at most 256, drawn by the seed.

    Raises:
        UserError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} training row leaves none to validate settings on",
            where="data.train",
            hint="give more rows, or fix train.learning_rate so that nothing is tuned",
        )
    count = min(VALIDATION_ROWS, max(1, round(VALIDATION_SHARE * len(rows))))
    drawn = np.zeros(len(rows), bool)
    drawn[np.random.default_rng([seed % 2**64, _SPLITTING]).permutation(len(rows))[:count]] = True
    return picked(rows, np.flatnonzero(~drawn)), picked(rows, np.flatnonzero(drawn))
