"""How well a model predicts classes, numbers, or which of two texts is preferred: metrics, predictions row by
row, and their interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from deltaw.data.example import RowGroup
from deltaw.data.label_batches import LabelMicroBatcher
from deltaw.data.labels import AnyExample
from deltaw.errors import UserError
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.evaluation.metrics import classification_metrics, confusion, regression_metrics
from deltaw.training.preference_losses import named
from deltaw.training.tasks.label_objective import LabelObjective, losses_of_pairs


@dataclass(frozen=True)
class LabelEvaluation(Evaluation):
    """With ``predictions`` in the order of the examples: (rows, classes) logits, or (rows,) numbers.

    ``per_row`` is 1.0 where the class is right and 0.0 elsewhere, or the squared error.
    """

    predictions: np.ndarray = field(default_factory=lambda: np.zeros(0))


def evaluate_labels(
    objective: LabelObjective,
    examples: Sequence[AnyExample],
    batcher: LabelMicroBatcher,
    classes: Sequence[str] = (),
) -> LabelEvaluation:
    """Evaluate a model on labeled rows.

    Raises:
        UserError: the model's predictions are not finite.
    """
    if isinstance(examples[0], RowGroup):
        return _of_pairs(objective, examples, batcher)  # type: ignore[arg-type]
    parts, order = [], []
    place = {id(example): index for index, example in enumerate(examples)}
    with torch.no_grad():
        for batch in batcher.batches(examples):
            parts.append(objective.predictions(batch).cpu().numpy())
            order += [place[id(example)] for example in batch.examples]
    gathered = np.concatenate(parts)
    predictions = np.empty_like(gathered)
    predictions[order] = gathered
    if not np.isfinite(predictions).all():
        raise UserError(
            "the model's predictions are not finite",
            hint="if the adapter was trained, train it again with a lower train.learning_rate",
        )
    truth = np.array([example.label for example in examples])
    if objective.task == "regression":
        return _of_numbers(truth, predictions)
    return _of_classes(truth, predictions, tuple(classes))


@torch.no_grad()
def _of_pairs(
    objective: LabelObjective, pairs: Sequence[RowGroup], batcher: LabelMicroBatcher
) -> LabelEvaluation:
    """Rewards of pairs: the loss, the share whose preferred text has the higher one, and both rewards."""
    place = {id(pair.rows[0]): index for index, pair in enumerate(pairs)}
    # Of each pair: loss, accuracy, rewards of the preferred text and the other.
    table = np.empty((len(pairs), 4))
    for batch in batcher.batches(pairs):  # type: ignore[arg-type]
        found = losses_of_pairs(objective.predictions(batch), batch.targets)
        values = torch.cat([found.losses[:, None], found.accuracies[:, None], found.rewards], 1)
        table[[place[id(row)] for row in batch.examples[::2]]] = values.cpu().double().numpy()
    if not np.isfinite(table).all():
        raise UserError(
            "the model's rewards are not finite",
            hint="if the adapter was trained, train it again with a lower train.learning_rate",
        )
    loss, accuracy, chosen, rejected = table.mean(0).tolist()
    return LabelEvaluation(
        metrics={"loss": loss, **named(accuracy, chosen, rejected)},
        main="accuracy",
        higher_is_better=True,
        per_row=table[:, 1].copy(),
        interval=mean_interval(table[:, 1]),
        predictions=table[:, 2:].copy(),
    )


def _of_numbers(truth: np.ndarray, predictions: np.ndarray) -> LabelEvaluation:
    squared = (predictions.astype(np.float64) - truth) ** 2
    return LabelEvaluation(
        metrics=regression_metrics(truth, predictions),
        main="mse",
        higher_is_better=False,
        per_row=squared,
        interval=mean_interval(squared),
        predictions=predictions,
    )


def _of_classes(truth: np.ndarray, logits: np.ndarray, classes: tuple[str, ...]) -> LabelEvaluation:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(truth)), truth]
    chosen = logits.argmax(1)
    counts = confusion(truth, chosen, logits.shape[1])
    right = (chosen == truth).astype(np.float64)
    return LabelEvaluation(
        metrics={"loss": float(losses.mean()), **classification_metrics(counts)},
        main="accuracy",
        higher_is_better=True,
        per_row=right,
        interval=mean_interval(right),
        classes=classes,
        confusion=counts,
        predictions=logits,
    )
