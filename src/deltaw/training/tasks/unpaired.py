"""How single answers are trained: their own rows with gradients, and before each step those of mismatched
answers without, which tell how far the model has moved.

An item of the data is a group of two rows (:mod:`deltaw.data.unpaired`); microbatches hold the first of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.example import RowGroup
from deltaw.hub.skeleton import has_values
from deltaw.kernels.layout import Layout
from deltaw.preference_settings import PreferenceSettings
from deltaw.training.losses import RowLogProbs
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.unpaired_loss import UnpairedLoss


@dataclass(frozen=True)
class UnpairedMicroBatcher(CausalMicroBatcher):
    """Lays out the first row of each group; rows that come alone as they are."""

    def costing(self, rows: Sequence[Any]) -> list[Any]:
        """What a microbatch holds of each row."""
        return _firsts(rows)

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        return super().batches(_firsts(rows))

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return super().shapes(_firsts(rows))

    def labels(self, rows: Sequence[Any]) -> list[int]:
        return super().labels(_firsts(rows))

    def layouts(self, rows: Sequence[Any]) -> Iterator[Layout]:
        return super().layouts(_firsts(rows))

    def whole(self, rows: Sequence[Any]) -> Iterator[Any]:
        """The microbatches of both rows of each group, their prompt computed once."""
        return super().batches(rows)


class UnpairedObjective(CausalObjective):
    """The loss of single answers."""

    def __init__(self, model: PreTrainedModel, settings: PreferenceSettings) -> None:
        self.unpaired = UnpairedLoss(settings)
        super().__init__(model, self.unpaired)

    @torch.no_grad()
    def begin(self, rows: Sequence[RowGroup], batcher: AnyBatcher, processes: Reducer = ALONE) -> None:
        """Run the model on the mismatched answers of a step, without gradients, and estimate its distance
        from the reference: each process on its own part of them, the estimate of all."""
        if not has_values(self.model):
            return  # a dry run sees what a step needs at most: the microbatches with gradients
        own = processes.deal(mismatched(rows), batcher)
        self.unpaired.estimate(processes.add(distance(self, batcher.batches(own))))


def distance(objective: UnpairedObjective, batches: Iterable[Any]) -> Tensor:
    """(2,) the sum of r over the rows of microbatches, and their number
    (:meth:`deltaw.training.unpaired_loss.UnpairedLoss.distance`)."""
    found = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        found += objective.unpaired.distance(RowLogProbs.of(batch, objective.token_log_probs(batch))).cpu()
    return found


def mismatched(rows: Sequence[RowGroup]) -> list[Any]:
    """The second row of each group."""
    return [group.rows[1] for group in rows]


def _firsts(rows: Sequence[Any]) -> list[Any]:
    return [row.rows[0] if isinstance(row, RowGroup) else row for row in rows]
