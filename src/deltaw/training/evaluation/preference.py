"""How well a model tells chosen answers from rejected ones, or desired ones from others: loss, accuracy,
margin and rewards."""

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
from deltaw.training.tasks.unpaired import UnpairedObjective, distance, mismatched
from deltaw.training.unpaired_loss import named_answers


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
    _check_finite(mean_loss)
    metrics = {"loss": mean_loss, **named(accuracy, chosen, rejected)}
    accuracies = table[:, 1]
    return Evaluation(metrics, "accuracy", True, accuracies, mean_interval(accuracies))


@torch.no_grad()
def evaluate_unpaired(
    objective: UnpairedObjective, answers: Sequence[RowGroup], batcher: AnyBatcher
) -> Evaluation:
    """The mean loss of single answers, the share whose reward is on the right side of the model's distance
    from the reference (half where it is on neither), that distance, and the mean rewards of either kind.

    The distance is one number of all these answers.

    Raises:
        UserError: the loss is not finite, or rows lack what their loss needs of the reference model.
    """
    loss = objective.unpaired
    parts = [answers[start : start + ROWS_AT_ONCE] for start in range(0, len(answers), ROWS_AT_ONCE)]
    loss.estimate(distance(objective, batcher.batches(mismatched(answers))))
    # Of each answer: loss, accuracy, reward, whether it is desired.
    table = np.empty((len(answers), 4))
    for number, part in enumerate(parts):
        place = {id(answer.rows[0]): number * ROWS_AT_ONCE + n for n, answer in enumerate(part)}
        for batch in batcher.batches(part):
            rows = RowLogProbs.of(batch, objective.token_log_probs(batch))
            found = loss.of_rows(rows)
            columns = [found.losses, found.accuracies, found.rewards, found.desired.to(found.rewards.dtype)]
            table[[place[id(row)] for row in rows.rows]] = torch.stack(columns, 1).cpu().double().numpy()
    losses, accuracies, rewards, desired = table.T
    mean_loss = float(losses.mean())
    _check_finite(mean_loss)
    metrics = {
        "loss": mean_loss,
        **named_answers(
            float(accuracies.sum()),
            float((rewards * desired).sum()),
            float((rewards * (1 - desired)).sum()),
            float(desired.sum()),
            float((1 - desired).sum()),
            float(loss.divergence) * len(answers),
        ),
    }
    return Evaluation(metrics, "accuracy", True, accuracies.copy(), mean_interval(accuracies))


def _check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of the evaluated answers is {loss}",
            hint="if the adapter was trained, train it again with a lower train.learning_rate",
        )
