"""Losses of the vectors of a step. Each function returns the mean over rows.

The functions receive the vectors of all rows of a step: for each row its query, then its passages. Formulas follow
sentence-transformers 6, which the tests compare against, or the cited paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltaw.errors import UserError
from deltaw.kernels.layout import to_device
from deltaw.tasks.embedding.rows import TextGroup
from deltaw.tasks.embedding.settings import EmbeddingSettings


@dataclass(frozen=True)
class EmbeddingLayout:
    """Indices of the vectors of a step's rows, and their labels.

    Attributes:
        queries: int64 (rows,) index of each row's query.
        passages: int64 (rows,) index of each row's first passage.
        negatives: int64 (k,) indices of the further passages.
        owners: int64 (k,) row of each further passage.
        false_negatives: bool (rows, rows + k), over candidates with first passages before the negatives. True if a
            candidate of another row is relevant to the row too, or equals its query or its passage.
        scores: fp32 (rows, s), empty if rows have no scores.
        classes: int64 (rows,), -1 if rows have no class.
    """

    queries: Tensor
    passages: Tensor
    negatives: Tensor
    owners: Tensor
    false_negatives: Tensor
    scores: Tensor
    classes: Tensor

    @classmethod
    def of(cls, rows: Sequence[TextGroup], device: torch.device) -> EmbeddingLayout:
        """Create the layout of rows with concatenated vectors."""
        counts = np.array([len(row.rows) for row in rows])
        starts = np.cumsum(counts) - counts
        has_passages = bool((counts > 1).all())
        firsts = starts + 1 if has_passages else starts
        negatives = np.concatenate([np.arange(s + 2, s + c) for s, c in zip(starts, counts, strict=True)])
        owners = np.repeat(np.arange(len(rows)), np.maximum(0, counts - 2))
        candidates = [(row, row.rows[1]) for row in rows if has_passages]
        candidates += [(row, text) for row in rows for text in row.rows[2:]]
        texts: dict[bytes, int] = {}
        groups: dict[bytes, int] = {}
        text = np.array([texts.setdefault(item.tokens.tobytes(), len(texts)) for _, item in candidates], np.int64)
        group = np.array([groups.setdefault(row.group, len(groups)) for row in rows], np.int64)
        false_negatives = np.zeros((len(rows), len(candidates)), bool)
        if has_passages:
            relevant = np.zeros((len(groups), len(texts)), bool)
            relevant[group, text[: len(rows)]] = True
            for row, group_index in zip(rows, group, strict=True):
                if (own_text := texts.get(row.rows[0].tokens.tobytes())) is not None:
                    relevant[group_index, own_text] = True
            false_negatives = relevant[group][:, text]
            false_negatives[np.arange(len(rows)), np.arange(len(rows))] = False
        numbers = {"queries": starts, "passages": firsts, "owners": owners, "false_negatives": false_negatives}
        numbers["negatives"] = negatives.astype(np.int64)
        arrays = {name: torch.from_numpy(array) for name, array in numbers.items()}
        arrays["scores"] = torch.tensor([row.scores for row in rows], dtype=torch.float32)
        arrays["classes"] = torch.tensor([-1 if row.label is None else row.label for row in rows])
        return cls(**{name: to_device(value, device) for name, value in arrays.items()})


VectorLoss: TypeAlias = Callable[[Tensor, EmbeddingLayout, EmbeddingSettings], Tensor]


def infonce(vectors: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    """InfoNCE loss (arXiv 1807.03748): cross-entropy of each query's passage against all passages of the step.

    Logits are similarities divided by the temperature. Candidates are the first passages of all rows and all further
    passages, without other relevant ones. ``symmetric`` averages this loss with the loss of each passage over all
    queries (arXiv 2103.00020).
    """
    count = len(rows.queries)
    scale = 1 / settings.effective_temperature
    candidates = torch.cat([vectors[rows.passages], vectors[rows.negatives]])
    similarities = vectors[rows.queries] @ candidates.T
    excluded = rows.false_negatives
    if settings.mask_above is not None:
        positive = similarities.detach().diagonal()[:, None]
        is_masked = similarities.detach() > positive + settings.mask_above
        excluded = excluded | (is_masked & _other_rows(rows, similarities))
    labels = torch.arange(count, device=vectors.device)
    scores = (similarities * scale).masked_fill(excluded, -torch.inf)
    loss = functional.cross_entropy(scores, labels)
    if not settings.symmetric:
        return loss
    return (loss + functional.cross_entropy(scores[:, :count].T, labels)) / 2


def _other_rows(rows: EmbeddingLayout, similarities: Tensor) -> Tensor:
    """Return a boolean mask of the shape of ``similarities``: True for candidates of other rows."""
    owners = torch.cat([torch.arange(len(similarities), device=similarities.device), rows.owners])
    return owners[None] != torch.arange(len(similarities), device=similarities.device)[:, None]


def cosent(vectors: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    """CoSENT loss: log(1 + Σ exp((s_i − s_j) / temperature) over rows i, j with label i < label j), s the cosine of a
    pair.
    """
    return _ordering_loss((vectors[rows.queries] * vectors[rows.passages]).sum(1), rows, settings)


def angle(vectors: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    """AnglE loss: :func:`cosent` with normalized angle differences in complex space (arXiv 2309.12871, eq. 6 to 9)."""
    a, b = vectors[rows.queries].chunk(2, 1)
    c, d = vectors[rows.passages].chunk(2, 1)
    if a.shape != b.shape:
        raise UserError("the loss 'angle' needs vectors of an even length", location="embedding.loss")
    z = (c.square() + d.square()).sum(1, keepdim=True)
    scale = ((a.square() + b.square()).sum(1, keepdim=True) / z).sqrt() * z
    parts = torch.cat([(a * c + b * d) / scale, (b * c - a * d) / scale], 1)
    return _ordering_loss(parts.sum(1).abs(), rows, settings)


def _ordering_loss(scores: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    labels = rows.scores[:, 0]
    differences = (scores[:, None] - scores[None]) / settings.effective_temperature
    differences = differences[labels[:, None] < labels[None]]
    return torch.logsumexp(torch.cat([differences.new_zeros(1), differences]), 0)


def supcon(vectors: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2). A row with a unique class in the step contributes 0."""
    texts = vectors[rows.queries]
    if len(texts) == 1:
        return vectors.sum() * 0
    is_self = torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    similarities = (texts @ texts.T / settings.effective_temperature).masked_fill(is_self, -torch.inf)
    same_class = (rows.classes[:, None] == rows.classes[None]) & ~is_self
    log_shares = (similarities - similarities.logsumexp(1, keepdim=True)).masked_fill(~same_class, 0)
    return -(log_shares.sum(1) / same_class.sum(1).clamp(min=1)).mean()


def margin_mse(vectors: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    """Squared difference between the student's margin of the first passage over each further one and the teacher's.

    See arXiv 2010.02666. The teacher's margin is given directly or as the difference of its scores.
    """
    positive, negative = _passage_similarities(vectors, rows)
    margins = rows.scores
    if margins.shape[1] == negative.shape[1] + 1:
        margins = margins[:, :1] - margins[:, 1:]
    return functional.mse_loss(positive - negative, margins.to(positive.dtype))


def kl(vectors: Tensor, rows: EmbeddingLayout, settings: EmbeddingSettings) -> Tensor:
    """KL divergence from the teacher's softmax over a row's passages to the student's, times temperature²."""
    temperature = settings.effective_temperature
    scores = torch.cat(_passage_similarities(vectors, rows), 1) / temperature
    teacher = (rows.scores.to(scores.dtype) / temperature).softmax(1)
    return functional.kl_div(scores.log_softmax(1), teacher, reduction="batchmean") * temperature**2


def _passage_similarities(vectors: Tensor, rows: EmbeddingLayout) -> tuple[Tensor, Tensor]:
    """Return the similarities of each query to its first passage (rows, 1) and to its further passages (rows,
    negatives).
    """
    queries = vectors[rows.queries]
    positive = (queries * vectors[rows.passages]).sum(1)
    negative = (queries[rows.owners] * vectors[rows.negatives]).sum(1)
    return positive[:, None], negative.view(len(queries), -1)


LOSSES: dict[str, VectorLoss] = {"infonce": infonce, "cosent": cosent, "angle": angle, "supcon": supcon}
LOSSES |= {"margin-mse": margin_mse, "kl": kl}


def step_loss(vectors: Tensor, rows: Sequence[TextGroup], settings: EmbeddingSettings, *, normalize: bool) -> Tensor:
    """Return the mean loss over rows, summed over the configured numbers of dimensions (Matryoshka, arXiv 2205.13147).

    Args:
        vectors: (texts, width) pooled vectors of each row's query and passages, in order.
        normalize: True if the model's vectors are normalized. For cosine similarity they are always normalized here.
    """
    layout = EmbeddingLayout.of(rows, vectors.device)
    settings = settings.model_copy(update={"loss": select_loss(rows, settings)})
    loss = LOSSES[settings.loss]
    cosine = settings.effective_similarity == "cosine"
    total = vectors.new_zeros(())
    for count in settings.dimensions or [vectors.shape[1]]:
        part = vectors[:, :count]
        total = total + loss(functional.normalize(part, dim=1) if cosine or normalize else part, layout, settings)
    return total


def select_loss(rows: Sequence[TextGroup], settings: EmbeddingSettings) -> str:
    """Return the configured loss, or for ``auto`` the loss that fits the rows.

    Raises:
        UserError: if the rows do not fit the loss, or have different numbers of scores.
    """
    first = rows[0]
    different = next((row for row in rows if len(row.scores) != len(first.scores)), None)
    if different is not None:
        message = f"row {first.row} has {len(first.scores)} scores, and row {different.row} {len(different.scores)}"
        raise UserError(message, location="data", hint="use the same number of passages in each row")
    passages = len(first.rows) - 1
    scores = len(first.scores)
    if first.label is not None:
        default = "supcon"
    elif not scores:
        default = "infonce"
    elif passages == 1:
        default = "cosent"
    else:
        default = "margin-mse" if scores == 1 else "kl"
    loss = default if settings.loss == "auto" else settings.loss
    fits = {default, *{"cosent": {"angle"}, "kl": {"margin-mse"}}.get(default, set())}
    if loss not in fits:
        content = "a class" if first.label is not None else f"{passages} passages and {scores} scores"
        hint = f"set embedding.loss: {default}, or other columns"
        raise UserError(f"the loss '{loss}' does not fit rows with {content}", location="embedding.loss", hint=hint)
    return loss
