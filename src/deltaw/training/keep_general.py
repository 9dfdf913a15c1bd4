"""Keeping general answers: each step also learns one of the base model's own answers to general prompts.

Self-distillation by rehearsal: the base model writes answers before training
(:mod:`deltaw.training.evaluation.general`), and their cross-entropy is added to a step's loss. So the factors
are pushed away from changes that general answers would pay for. The prompts are others than those that drift
is measured on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.data.packing import epoch_order
from deltaw.training.losses import unrounded
from deltaw.training.microbatches import AnyBatcher, AnyObjective


class KeepGeneral:
    """Adds the gradients of weight · (mean cross-entropy of general answers) to those of a step.

    Args:
        objective: the sum of a microbatch's losses. batcher: cuts rows into microbatches.
        rows: general answers, as the model is to see them.
        weight: what their mean loss is multiplied with; the data's mean loss has weight 1.
        seed: of their order. per_step: how many of them a step takes.
    """

    def __init__(
        self,
        objective: AnyObjective,
        batcher: AnyBatcher,
        rows: Sequence[Example],
        *,
        weight: float,
        seed: int,
        per_step: int = 1,
    ) -> None:
        self._objective = objective
        self._batcher = batcher
        self._rows = rows
        self._weight = weight
        self._seed = seed
        self._per_step = per_step

    def rows_of(self, step: int) -> list[Example]:
        """The answers of step ``step`` (from 0), a function of its number: each once before any twice."""
        count = len(self._rows)
        places = np.arange(step * self._per_step, (step + 1) * self._per_step)
        orders = {epoch: epoch_order(count, epoch, self._seed) for epoch in set((places // count).tolist())}
        return [self._rows[orders[place // count][place % count]] for place in places.tolist()]

    def __call__(self, step: int) -> Tensor:
        """Add the gradients for step ``step``; the mean loss of its answers in nats a token, unweighted: a
        scalar on the model's device, which is not waited for."""
        rows = self.rows_of(step)
        units = self._objective.units(rows)
        total = torch.zeros(())
        for batch in self._batcher.batches(rows):
            loss = self._objective(batch)
            (self._weight * loss / units).backward()
            total = total + unrounded(loss)
        return total / units
