"""How single answers are trained: their own rows with gradients, and before each step those of mismatched
answers without, which tell how far the model has moved.

An item of the data is a group of two rows (:mod:`deltaw.data.unpaired`); microbatches hold the first of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaw.data.example import RowGroup
from deltaw.hub.skeleton import has_values
from deltaw.kernels.layout import Layout
from deltaw.preference_settings import PreferenceSettings
from deltaw.training.losses import RowLogProbs
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.tasks.causal_batcher import CausalMicroBatcher
from deltaw.training.tasks.causal_objective import CausalObjective
from deltaw.training.unpaired_loss import UnpairedLoss


@dataclass(frozen=True)
class UnpairedMicroBatcher(CausalMicroBatcher):
    """Lays out the first row of each group; rows that come alone as they are."""

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
    def begin(self, rows: Sequence[RowGroup], batcher: AnyBatcher) -> None:
        """Run the model on the mismatched answers of a step, without gradients, and estimate its distance
        from the reference."""
        if not has_values(self.model):
            return  # a dry run sees what a step needs at most: the microbatches with gradients
        found = [
            self.unpaired.ratios(RowLogProbs.of(batch, self.token_log_probs(batch)))
            for batch in batcher.batches([group.rows[1] for group in rows])
        ]
        self.unpaired.estimate(torch.cat(found))


def _firsts(rows: Sequence[Any]) -> list[Any]:
    return [row.rows[0] if isinstance(row, RowGroup) else row for row in rows]
