"""Trial of settings, evaluated on validation rows that are split off the training rows.

Learning rates and other settings are chosen by the validation loss. No choice depends on the held-out rows, which give
the final score.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from deltaw.data.example import select_rows
from deltaw.data.row_reader import RunData
from deltaw.errors import UserError
from deltaw.experiments.folder import Budget
from deltaw.experiments.until_flat import TrainingCurve, until_flat, validation_loss
from deltaw.progress import LogFunction, ignore_line
from deltaw.runs.load_model import load_model
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import Callback
from deltaw.training.session import Session, assemble, read_data
from deltaw.training.state import Step
from deltaw.training.task import Task

VALIDATION_SHARE = 0.1
VALIDATION_ROWS = 256
_SPLITTING = 4  # selects a separate random stream for the seed

# Receives the number of an evaluation and its loss. Returns True to continue the training.
OnEvaluation: TypeAlias = Callable[[int, float], bool]
TaskData: TypeAlias = tuple[Task, RunData]


class TrainingStopped(Exception):
    """Raised if a training was stopped early, by its caller or by a signal."""


class Trial:
    """Model and rows of a run, for repeated training from the same initialization.

    Args:
        config: Settings of the run.
        log: Receives messages for the user.
        known: Task and rows that have been read already.
        once: Train only once, without a copy of the initialization.

    Attributes:
        session: Training session.
        task: Task, which another trial on the same rows can reuse.
        data: Rows, which another trial can reuse.
        training: Training rows.
        validation: Validation rows.
        chosen: Automatic choices with reasons, by dotted key.

    Raises:
        UserError: As for a run, or if the rows do not suffice for a validation set.
    """

    def __init__(
        self, config: RunConfig, log: LogFunction = ignore_line, loaded: TaskData | None = None, *, once: bool = False
    ) -> None:
        # Store features of frozen layers, because rows are used repeatedly.
        self.config = config.with_train(keep_features=True)
        self._log = log
        self._once = once
        self.task, self.data = loaded or read_data(self.config, log)
        self._needs_reload = False
        self._open()

    def _open(self) -> None:
        loaded = load_model(self.config, self.task, self.data, self._log)
        offered = () if loaded.kernels is None else loaded.kernels.approximations
        model = loaded.model
        device = str(loaded.choices["device"].value)
        self.session: Session = assemble(
            self.config, self.task, self.data, model, device=device, new_modules=loaded.new_modules, candidates=offered
        )
        self.chosen = {**loaded.choices, **self.session.chosen}
        for line in [*self.session.notes, *self.session.lines()]:
            self._log(line)
        self.training, self.validation = split_validation(self.session.data.train, self.config.data_seed)
        self._start = [] if self._once else [p.detach().clone() for _, p in self._parameters()]

    def steps(self, share: float) -> int:
        """Return the number of steps of a share of the run."""
        return max(1, math.ceil(share * self.session.total_steps))

    def loss(self, rate: float, steps: int, *, every: int | None = None, callback: OnEvaluation | None = None) -> float:
        """Train from the initialization and return the validation loss, which is infinite if training diverges.

        Args:
            rate: Peak learning rate.
            steps: Number of optimizer steps.
            every: Interval of additional evaluations in steps.
            callback: Receives the number of an evaluation (from 1) and its loss. Returns True to continue.

        Raises:
            TrainingStopped: If ``callback`` returned False, or a signal arrived.
        """
        self._reset()
        with self.session.running():

            def on_step(step: Step) -> None:
                if every is None or callback is None or step.step % every or step.step == steps:
                    return
                if not callback(step.step // every, validation_loss(self.session, self.validation)):
                    raise TrainingStopped

            try:
                outcome = self.session.train(on_step=on_step, total_steps=steps, learning_rate=rate, rows=self.training)
                if outcome.interrupted:
                    raise TrainingStopped
                loss = validation_loss(self.session, self.validation)
            except UserError as error:
                self._log(f"learning rate {rate:g}: {error.message}")
                return math.inf
        self._needs_reload = False
        return loss

    def until_flat(self, rate: float, budget: Budget, callback: Callback | None = None) -> TrainingCurve:
        """Train from the initialization until the validation loss flattens or the budget ends.

        Args:
            callback: Receives the events of :func:`deltaw.experiments.until_flat.until_flat`.

        Raises:
            UserError: If training diverged.
            TrainingStopped: If a signal arrived.
        """
        self._reset()
        with self.session.running():
            curve = until_flat(
                self.session, self.training, self.validation, rate=rate, budget=budget, callback=callback
            )
        if curve.outcome.interrupted:
            raise TrainingStopped
        self._needs_reload = False
        return curve

    @torch.no_grad()
    def _reset(self) -> None:
        """Reset the trained parameters to the initialization. The model is loaded again after a training that did not
        finish.
        """
        if self._needs_reload:
            self.close()
            with torch.enable_grad():
                self._open()
        self._needs_reload = True
        if self._once:
            return
        for (_, parameter), start in zip(self._parameters(), self._start, strict=True):
            parameter.copy_(start)
            parameter.grad = None
        self.session.method.after_step(self.session.model)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.session.method.parameters(self.session.model))

    def close(self) -> None:
        """Release the model and the stored features."""
        if hasattr(self, "session"):
            self.session.close()
            del self.session, self._start
            gc.collect()


def split_validation(rows: Sequence[Any], seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split off a tenth of the rows, at most 256, as validation rows by the seed.

    Raises:
        UserError: If there are fewer than two rows.
    """
    if len(rows) < 2:
        hint = "use more rows, or set train.learning_rate to a number, so that nothing is tuned"
        raise UserError(f"{len(rows)} training row is too few for validation", location="data.train", hint=hint)
    count = min(VALIDATION_ROWS, max(1, round(VALIDATION_SHARE * len(rows))))
    is_validation = np.zeros(len(rows), bool)
    is_validation[np.random.default_rng([seed % 2**64, _SPLITTING]).permutation(len(rows))[:count]] = True
    return select_rows(rows, np.flatnonzero(~is_validation)), select_rows(rows, np.flatnonzero(is_validation))
