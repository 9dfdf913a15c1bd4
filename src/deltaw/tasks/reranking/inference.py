"""Scores of passages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.data.example import LabeledExample
from deltaw.inference.task_inference import Predictions, TaskInference
from deltaw.settings.data import DataSettings
from deltaw.tasks.classification.objective import LabelObjective
from deltaw.tasks.classification.task import predict_rows
from deltaw.tasks.reranking.rows import PairEncoder, RerankReader
from deltaw.tasks.reranking.task import RerankingTask
from deltaw.training.batcher import Batcher
from deltaw.training.task import Classes, Rows


class RerankingInference(TaskInference[RerankingTask]):
    """Scores and ranks the passages of a query."""

    def reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> RerankReader:
        return self.task.reader(settings, labeled=False)

    def predict(self, objective: LabelObjective, rows: Rows, batcher: Batcher, classes: Classes) -> Predictions:
        """Return the sigmoid of each score, and for rows with several passages the passage indices, best first."""
        predictions = predict_rows(objective, rows, batcher).astype(np.float64)
        scores = []
        ranking = []
        for part in np.split(predictions, np.cumsum([len(row.rows) for row in rows])[:-1]):
            probabilities = (1 / (1 + np.exp(-part))).tolist()
            has_several = len(part) > 1
            scores.append(probabilities if has_several else probabilities[0])
            ranking.append(np.argsort(-part, kind="stable").tolist() if has_several else None)
        return scores, ranking

    def encode_pair(self, query: str, passage: str) -> LabeledExample:
        ((ids, segments),) = PairEncoder(self.task.tokenizer)([(query, passage)])  # type: ignore[arg-type]
        return LabeledExample(0, ids, 0, segments)
