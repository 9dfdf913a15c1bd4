"""Drift of an embedding model: share of each general sentence's nearest neighbors that did not change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltaw.data.example import LabeledExample
from deltaw.progress import track_progress
from deltaw.training.embedding.objective import EmbeddingObjective, text_key, texts_of
from deltaw.training.evaluation.general_prompts import DRIFT_PROMPTS, REHEARSAL_PROMPTS
from deltaw.training.evaluation.retrieval import neighbor_agreement
from deltaw.training.rendered_rows import render_example
from deltaw.training.session import Session
from deltaw.training.tasks.labels import text_positions

NEIGHBORS = 10


@dataclass(frozen=True)
class NeighborDrift:
    """Drift on general sentences.

    Attributes:
        agreement: Mean share of each sentence's nearest neighbors that are the same as for the base model.
        neighbors: Number of nearest neighbors.
        sentences: Number of compared sentences.
    """

    agreement: float
    neighbors: int
    sentences: int

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        nearest = f"the {self.neighbors} nearest neighbors of {self.sentences} general sentences"
        return f"drift: of {nearest}, {self.agreement:.0%} are those of the base model"


@torch.no_grad()
def neighbor_drift(session: Session) -> NeighborDrift | None:
    """Return the drift of a run's adapter.

    Returns None if the run does not train embeddings, drift is disabled, or the base model cannot be restored.
    """
    objective, method, model = session.objective, session.method, session.model
    tokenizer = session.task.tokenizer
    if not isinstance(objective, EmbeddingObjective) or tokenizer is None or not method.can_restore_base(model):
        return None
    if session.config.train.drift is False:
        return None
    limit = text_positions(model)
    truncation = {} if limit is None else {"truncation": True, "max_length": limit - method.virtual_tokens}
    ids = tokenizer([*DRIFT_PROMPTS, *REHEARSAL_PROMPTS], return_attention_mask=False, **truncation)["input_ids"]
    rows = [LabeledExample(number, np.asarray(token_ids, np.int32), 0) for number, token_ids in enumerate(ids)]
    with session.running(), method.evaluating(model), track_progress("comparing general sentences"):
        after = _vectors(session, objective, [render_example(row, method) for row in rows])
        with method.base_model_active(model):
            before = _vectors(session, objective, rows)
    return NeighborDrift(neighbor_agreement(before, after, NEIGHBORS), NEIGHBORS, len(rows))


def _vectors(session: Session, objective: EmbeddingObjective, rows: Sequence[Any]) -> Tensor:
    """Return (rows, width) normalized vectors."""
    vectors: dict[bytes, Tensor] = {}
    for batch in session.batcher.batches(rows):
        vectors.update(zip(map(text_key, texts_of(batch)), objective.evaluate_rows(batch).cpu(), strict=True))
    return functional.normalize(torch.stack([vectors[text_key(row)] for row in rows]).float(), dim=1)
