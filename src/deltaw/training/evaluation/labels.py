"""How well a model predicts classes or numbers: metrics, predictions row by row, and their interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from deltaw.data.label_batches import LabelMicroBatcher
from deltaw.data.labels import AnyExample
from deltaw.errors import UserError
from deltaw.training.evaluation.base import Evaluation, mean_interval
from deltaw.training.evaluation.metrics import classification_metrics, confusion, regression_metrics
from deltaw.training.tasks.label_objective import LabelObjective


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
