"""Vectors of texts, and the evaluation of their search."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from deltaw.decoding.opening import SessionGenerator
from deltaw.hub.sentence_layout import SentenceLayout
from deltaw.inference.loaded_run import LoadedRun
from deltaw.inference.scores import EvaluationScore, ScoreOptions
from deltaw.inference.task_inference import Predictions, TaskInference
from deltaw.settings.data import DataSettings
from deltaw.tasks.embedding.objective import EmbeddingObjective, text_key
from deltaw.tasks.embedding.rows import EmbeddingReader
from deltaw.tasks.embedding.task import EmbeddingTask, embed_texts
from deltaw.training.batcher import Batcher
from deltaw.training.evaluation.base import check_finite
from deltaw.training.task import Classes, Rows


class EmbeddingInference(TaskInference[EmbeddingTask]):
    """Embeds texts."""

    outputs = "vectors"
    _reader: EmbeddingReader

    def reader(self, settings: DataSettings, columns: Sequence[str], classes: Classes) -> EmbeddingReader:
        self._reader = self.task.reader(settings, labeled=False)
        return self._reader

    @torch.no_grad()
    def predict(self, objective: EmbeddingObjective, rows: Rows, batcher: Batcher, classes: Classes) -> Predictions:
        """Return the vector of each text, normalized if the model is configured so, or a list of vectors for several
        passages.
        """
        vectors = embed_texts(objective, rows, batcher)
        if objective.layout.normalize:
            vectors = {key: functional.normalize(vector, dim=0) for key, vector in vectors.items()}
        values_by_key = {key: [float(str(v)) for v in vector.float().numpy()] for key, vector in vectors.items()}
        check_finite("the vectors are", np.array([*values_by_key.values()]))
        row_vectors = [[values_by_key[text_key(text)] for text in row.rows] for row in rows]
        queries = [[vectors_of_row.pop(0) for vectors_of_row in row_vectors]] if len(self._reader.predicts) == 2 else []
        return [*queries, [v[0] if len(v) == 1 else v for v in row_vectors]]

    def layout(self, model: PreTrainedModel) -> SentenceLayout:
        return self.task.layout(model)

    @property
    def vector_lengths(self) -> Sequence[int]:
        return self.task.settings.dimensions

    def score(
        self, opened: LoadedRun, rows: Rows, options: ScoreOptions, generator: SessionGenerator | None
    ) -> EvaluationScore:
        """Search all passages of the file."""
        self.task.max_searched_passages = None
        return super().score(opened, rows, options, generator)
