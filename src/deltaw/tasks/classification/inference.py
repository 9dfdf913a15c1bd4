"""Predictions of classes, numbers and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaw.data.row_reader import RowReader
from deltaw.inference.task_inference import Predictions, TaskInference
from deltaw.settings.data import DataSettings
from deltaw.settings.row_kinds import PAIR_COLUMNS
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.tasks.classification.rows import AnswerScoreReader, LabelReader, RewardReader
from deltaw.tasks.classification.task import LabelTask, predict_rows
from deltaw.training.batcher import Batcher
from deltaw.training.task import Classes, Rows


class LabelInference(TaskInference[LabelTask]):
    """Predicts the label of each row, or the rewards of its answers."""

    def reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RowReader[Any]:
        task = self.task
        if self._rewards(classes):
            assert task.tokenizer is not None
            if set(PAIR_COLUMNS) <= set(columns):
                return RewardReader(settings, task.tokenizer)
            if "text" not in columns or "prompt" in columns:
                return AnswerScoreReader(settings, task.tokenizer)
        return LabelReader(settings, task.tokenizer, task.name, classes=classes, encoder=task.encoder, labeled=False)

    def predict(self, objective: LabelObjective, rows: Rows, batcher: Batcher, classes: Classes) -> Predictions:
        predictions = predict_rows(objective, rows, batcher).astype(np.float64)
        if self.task.name == "regression":
            return [predictions.tolist()]
        if self._rewards(classes):
            return predictions.reshape(len(rows), -1).T.tolist()
        names = classes or ()
        probabilities = np.exp(predictions - predictions.max(1, keepdims=True))
        table = [[float(f"{p:.7g}") for p in row] for row in probabilities / probabilities.sum(1, keepdims=True)]
        return [names[index] for index in predictions.argmax(1)], [dict(zip(names, row, strict=True)) for row in table]

    def _rewards(self, classes: Classes) -> bool:
        """True if the model has a single output that is a reward."""
        return self.task.name == "sequence-classification" and len(classes or ()) == 1
