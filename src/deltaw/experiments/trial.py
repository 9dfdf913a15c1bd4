"""A training that is repeated from the same start, and judged by rows taken out of its training rows.

Learning rates and other settings are chosen by it. The held-out rows of the run take no part in it, so that
the final score is that of rows which nothing was chosen by.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.training.callbacks import Say, silent
from deltaw.training.fit import load_for
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import Step
from deltaw.training.tasks.tasks import RunData, Task

VALIDATION_SHARE = 0.1
VALIDATION_ROWS = 256
_SPLITTING = 4  # a random stream of the seed's own

Row = TypeVar("Row")


class Stopped(Exception):
    """A training was given up on the way, as whoever watched it asked."""


class Trial:
    """One run's model and rows, trained as often as asked.

    Args:
        config: the run's settings.
        say: told lines that a person may want to read.
        known: task and rows, where they have been read already.

    Attributes:
        session: the training.
        task, data: as the settings say, to be given to another trial on the same rows.
        training, validation: rows that are trained on, and those that judge.

    Raises:
        UserError: as for a run, or there are too few rows to take some out.
    """

    def __init__(
        self, config: RunConfig, say: Say = silent, known: tuple[Task, RunData] | None = None
    ) -> None:
        # Features of frozen layers are computed once for all repetitions.
        train = config.train.model_copy(update={"keep_features": True})
        self.config = config.model_copy(update={"train": train})
        self._say = say
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
        )
        for line in [*self.session.said, *self.session.lines()]:
            self._say(line)
        self.training, self.validation = split_off(self.session.data.train, self.config.train.seed)
        model = self.session.model
        self._start = [p.detach().clone() for _, p in self.session.method.parameters(model)]

    def steps(self, share: float) -> int:
        """Steps of a training that takes a share of the run's."""
        return max(1, math.ceil(share * self.session.total_steps))

    def loss(
        self,
        rate: float,
        steps: int,
        *,
        every: int | None = None,
        on_evaluation: Callable[[int, float], bool] | None = None,
    ) -> float:
        """The validation loss after a training from the start; infinite where it diverges.

        Args:
            rate: peak learning rate. steps: of the optimizer.
            every: evaluate on the way after so many steps, and tell ``on_evaluation`` which evaluation it is
                (from 1) and the loss.
            on_evaluation: whether to go on.

        Raises:
            Stopped: ``on_evaluation`` said no, or a signal came.
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

    def _validated(self) -> float:
        metrics = self.session.evaluate(self.validation).metrics
        return metrics["loss"] if "loss" in metrics else metrics["mse"]

    @torch.no_grad()
    def _restore(self) -> None:
        """What is trained as it was before any step; the loop itself draws alike for the same seed."""
        method, model = self.session.method, self.session.model
        for (_, parameter), start in zip(method.parameters(model), self._start, strict=True):
            parameter.copy_(start)
            parameter.grad = None
        method.after_step(model)

    def close(self) -> None:
        """Let go of the model and of what is kept on disk."""
        if hasattr(self, "session"):
            self.session.close()
            del self.session, self._start
            gc.collect()


def split_off(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and rows to judge by: a tenth of them and at most 256, drawn by the seed.

    Raises:
        UserError: there are fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} training row leaves none to judge settings by",
            where="data.train",
            hint="give more rows, or fix train.learning_rate so that nothing is tuned",
        )
    count = min(VALIDATION_ROWS, max(1, round(VALIDATION_SHARE * len(rows))))
    drawn = set(np.random.default_rng([seed % 2**64, _SPLITTING]).permutation(len(rows))[:count].tolist())
    training = [row for place, row in enumerate(rows) if place not in drawn]
    return training, [row for place, row in enumerate(rows) if place in drawn]
