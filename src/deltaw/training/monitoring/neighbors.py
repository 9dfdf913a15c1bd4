"""Drift of an embedding model: how much of each general sentence's neighborhood is still that of the base model.

Knows a session; shows nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltaw.data.example import LabeledExample
from deltaw.training.embedding.objective import EmbeddingObjective, key_of_text, texts_of
from deltaw.training.evaluation.general_prompts import KEPT, MEASURED
from deltaw.training.evaluation.retrieval import neighbor_agreement
from deltaw.training.seen import as_seen
from deltaw.training.session import Session
from deltaw.training.tasks.labels import text_positions
from deltaw.working import working

NEIGHBORS = 10


@dataclass(frozen=True)
class NeighborDrift:
    """What a training did to general sentences.

    Attributes:
        agreement: the mean share of each sentence's nearest others that are the same as the base model's.
        neighbors: how many are nearest. sentences: that were compared.
    """

    agreement: float
    neighbors: int
    sentences: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"drift: of {self.sentences} general sentences' {self.neighbors} nearest others, {self.agreement:.0%} are "
            "those of the base model"
        )


@torch.no_grad()
def neighbor_drift(session: Session) -> NeighborDrift | None:
    """The drift of a run's adapter; None for a run that embeds nothing, or whose base model is not kept."""
    objective, method, model = session.objective, session.method, session.model
    tokenizer = session.task.tokenizer
    if not isinstance(objective, EmbeddingObjective) or tokenizer is None or not method.keeps_base(model):
        return None
    if session.config.train.drift is False:
        return None
    limit = text_positions(model)
    cut = {} if limit is None else {"truncation": True, "max_length": limit - method.virtual_tokens}
    ids = tokenizer([*MEASURED, *KEPT], return_attention_mask=False, **cut)["input_ids"]
    rows = [LabeledExample(number, np.asarray(one, np.int32), 0) for number, one in enumerate(ids)]
    with session.running(), method.evaluating(model), working("comparing general sentences"):
        after = _vectors(session, objective, [as_seen(row, method) for row in rows])
        with method.without(model):
            before = _vectors(session, objective, rows)
    return NeighborDrift(neighbor_agreement(before, after, NEIGHBORS), NEIGHBORS, len(rows))


def _vectors(session: Session, objective: EmbeddingObjective, rows: Sequence[Any]) -> Tensor:
    """(rows, width) of length 1."""
    found: dict[bytes, Tensor] = {}
    for batch in session.batcher.batches(rows):
        found.update(zip(map(key_of_text, texts_of(batch)), objective.evaluate_rows(batch).cpu(), strict=True))
    return functional.normalize(torch.stack([found[key_of_text(row)] for row in rows]).float(), dim=1)
