"""How well a model tells chosen answers from rejected ones: loss, accuracy, margin and rewards of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from deltaw.data.example import RowGroup
from deltaw.errors import UserError
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.losses import RowLogProbs
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.preference_losses import PreferenceLoss, named
from deltaw.training.tasks.causal_batcher import ROWS_AT_ONCE
from deltaw.training.tasks.causal_objective import CausalObjective


@torch.no_grad()
def evaluate_preferences(
    objective: CausalObjective, pairs: Sequence[RowGroup], batcher: AnyBatcher
) -> Evaluation:
    """The mean loss of the pairs, the share whose chosen answer has the higher reward (pairs with equal
    rewards count half), the mean difference of rewards, and the mean rewards.

    Raises:
        UserError: the loss is not finite, or rows lack what their loss needs of the reference model.
    """
    loss = objective.loss
    assert isinstance(loss, PreferenceLoss)
    # Of each pair: loss, accuracy, rewards of chosen and rejected.
    table = np.empty((len(pairs), 4))
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        part = pairs[start : start + ROWS_AT_ONCE]
        place = {id(pair.rows[0]): start + number for number, pair in enumerate(part)}
        for batch in batcher.batches(part):
            rows = RowLogProbs.of(batch, objective.token_log_probs(batch))
            found = loss.of_rows(rows)
            columns = [found.losses[:, None], found.accuracies[:, None], found.rewards]
            values = torch.cat(columns, 1).cpu().double().numpy()
            table[[place[id(rows.rows[group[0]])] for group in rows.groups]] = values
    mean_loss, accuracy, chosen, rejected = table.mean(0).tolist()
    if not math.isfinite(mean_loss):
        raise UserError(
            f"the loss of the evaluated pairs is {mean_loss}",
            hint="if the adapter was trained, train it again with a lower train.learning_rate",
        )
    metrics = {"loss": mean_loss, **named(accuracy, chosen, rejected)}
    accuracies = table[:, 1]
    return Evaluation(metrics, "accuracy", True, accuracies, mean_interval(accuracies))
