"""Evaluation of preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from deltaw.data.example import RowGroup
from deltaw.data.packing import MicroBatch
from deltaw.tasks.preference.losses import PairLosses, preference_metrics
from deltaw.training.batcher import Batcher
from deltaw.training.evaluation.base import Evaluation, check_finite


@torch.no_grad()
def evaluate_pairs(
    pairs: Sequence[RowGroup], batcher: Batcher, losses_of: Callable[[MicroBatch], PairLosses]
) -> tuple[Evaluation, np.ndarray]:
    """Evaluate pairs of a chosen and a rejected row.

    The metrics are the mean loss, the accuracy (share of pairs whose chosen row has the higher reward, where equal
    rewards count half), the mean reward margin and the mean rewards.

    Args:
        losses_of: Returns the losses of the pairs of a microbatch.

    Returns:
        The evaluation with primary metric ``accuracy``, and the rewards (pairs, 2) of chosen and rejected rows.

    Raises:
        UserError: if a loss or a reward is not finite.
    """
    indices = {id(pair.rows[0]): index for index, pair in enumerate(pairs)}
    table = np.empty((len(pairs), 4))  # loss, accuracy, rewards
    for batch in batcher.batches(pairs):
        pair_losses = losses_of(batch)
        values = torch.cat([pair_losses.losses[:, None], pair_losses.accuracies[:, None], pair_losses.rewards], 1)
        table[[indices[id(row)] for row in batch.examples[::2]]] = values.cpu().double().numpy()
    check_finite("the losses and rewards of the evaluated pairs are", table)
    loss, *means = table.mean(0).tolist()
    accuracies = table[:, 1].copy()
    return Evaluation.of_rows({"loss": loss, **preference_metrics(*means)}, "accuracy", accuracies), table[:, 2:].copy()
