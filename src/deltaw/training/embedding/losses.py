"""Losses of a step's vectors, one function each; every function returns the mean over rows.

The vectors of all the rows of a step are there together, each row's query first and then its passages. Formulas are
those of sentence-transformers 6, which the tests compare them with, or of the paper named. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deltaw.data.retrieval import TextGroup
from deltaw.errors import UserError
from deltaw.task_settings import EmbeddingSettings


@dataclass(frozen=True)
class Layout:
    """Where the vectors of a step's rows are, and what is known of the rows.

    Attributes:
        queries, passages: int64 (rows,) places of each row's query and first passage.
        others: int64 (k,) places of further passages. owners: int64 (k,) their rows.
        same: bool (rows, rows + k), candidates, first passages before the others, that are right for a row too, or
            equal to its query or its passage, besides its own.
        scores: fp32 (rows, s); empty where rows have none. classes: int64 (rows,), -1 for none.
    """

    queries: Tensor
    passages: Tensor
    others: Tensor
    owners: Tensor
    same: Tensor
    scores: Tensor
    classes: Tensor

    @classmethod
    def of(cls, rows: Sequence[TextGroup], device: torch.device) -> Layout:
        """That of rows whose vectors follow each other."""
        counts = np.array([len(row.rows) for row in rows])
        starts = np.cumsum(counts) - counts
        has_passages = bool((counts > 1).all())
        firsts = starts + 1 if has_passages else starts
        others = np.concatenate([np.arange(s + 2, s + c) for s, c in zip(starts, counts, strict=True)])
        owners = np.repeat(np.arange(len(rows)), np.maximum(0, counts - 2))
        candidates = [(row, row.rows[1]) for row in rows if has_passages]
        candidates += [(row, text) for row in rows for text in row.rows[2:]]
        texts: dict[bytes, int] = {}
        groups: dict[bytes, int] = {}
        text = np.array([texts.setdefault(one.tokens.tobytes(), len(texts)) for _, one in candidates], np.int64)
        group = np.array([groups.setdefault(row.group, len(groups)) for row in rows], np.int64)
        same = np.zeros((len(rows), len(candidates)), bool)
        if has_passages:
            right = np.zeros((len(groups), len(texts)), bool)
            right[group, text[: len(rows)]] = True
            for row, one in zip(rows, group, strict=True):
                if (itself := texts.get(row.rows[0].tokens.tobytes())) is not None:
                    right[one, itself] = True
            same = right[group][:, text]
            same[np.arange(len(rows)), np.arange(len(rows))] = False
        found = {
            "queries": torch.from_numpy(starts),
            "passages": torch.from_numpy(firsts),
            "others": torch.from_numpy(others.astype(np.int64)),
            "owners": torch.from_numpy(owners),
            "same": torch.from_numpy(same),
            "scores": torch.tensor([row.scores for row in rows], dtype=torch.float32),
            "classes": torch.tensor([-1 if row.label is None else row.label for row in rows]),
        }
        return cls(**{name: value.to(device) for name, value in found.items()})


VectorLoss: TypeAlias = Callable[[Tensor, Layout, EmbeddingSettings], Tensor]


def infonce(vectors: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    """−log softmax of each query's own passage over the first passages of all rows and all further ones, by
    similarity over temperature (arXiv 1807.03748); ``symmetric`` adds the same of each passage over all queries, and
    halves the sum (arXiv 2103.00020). Candidates that are right too are left out."""
    count, scale = len(rows.queries), 1 / settings.usual_temperature
    candidates = torch.cat([vectors[rows.passages], vectors[rows.others]])
    similar = vectors[rows.queries] @ candidates.T
    left_out = rows.same
    if settings.mask_above is not None:
        own = similar.detach().diagonal()[:, None]
        left_out = left_out | ((similar.detach() > own + settings.mask_above) & _others(rows, similar))
    labels = torch.arange(count, device=vectors.device)
    scores = (similar * scale).masked_fill(left_out, -torch.inf)
    loss = functional.cross_entropy(scores, labels)
    if not settings.symmetric:
        return loss
    return (loss + functional.cross_entropy(scores[:, :count].T, labels)) / 2


def _others(rows: Layout, similar: Tensor) -> Tensor:
    """bool, as ``similar``: candidates of other rows."""
    owners = torch.cat([torch.arange(len(similar), device=similar.device), rows.owners])
    return owners[None] != torch.arange(len(similar), device=similar.device)[:, None]


def cosent(vectors: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    """log(1 + Σ exp((s_i − s_j) / temperature) over rows i, j with label i < label j), s the cosine of a pair."""
    return _ordered((vectors[rows.queries] * vectors[rows.passages]).sum(1), rows, settings)


def angle(vectors: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    """:func:`cosent` with the normalized difference of angles in complex space (arXiv 2309.12871, eq. 6 to 9)."""
    a, b = vectors[rows.queries].chunk(2, 1)
    c, d = vectors[rows.passages].chunk(2, 1)
    if a.shape != b.shape:
        raise UserError("the loss 'angle' needs vectors of an even length", where="embedding.loss")
    z = (c.square() + d.square()).sum(1, keepdim=True)
    scale = ((a.square() + b.square()).sum(1, keepdim=True) / z).sqrt() * z
    parts = torch.cat([(a * c + b * d) / scale, (b * c - a * d) / scale], 1)
    return _ordered(parts.sum(1).abs(), rows, settings)


def _ordered(scores: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    labels = rows.scores[:, 0]
    wrong = (scores[:, None] - scores[None]) / settings.usual_temperature
    wrong = wrong[labels[:, None] < labels[None]]
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)


def supcon(vectors: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    """−log softmax of rows of the same class over all other rows, the mean over them (arXiv 2004.11362, eq. 2); a row
    whose class comes once in the step adds nothing."""
    texts = vectors[rows.queries]
    if len(texts) == 1:
        return vectors.sum() * 0
    itself = torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    similar = (texts @ texts.T / settings.usual_temperature).masked_fill(itself, -torch.inf)
    alike = (rows.classes[:, None] == rows.classes[None]) & ~itself
    log_shares = (similar - similar.logsumexp(1, keepdim=True)).masked_fill(~alike, 0)
    return -(log_shares.sum(1) / alike.sum(1).clamp(min=1)).mean()


def margin_mse(vectors: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    """The squared difference between the student's margin, of the first passage over each further one, and the
    teacher's (arXiv 2010.02666); the teacher's is one number, or the difference of its scores."""
    own, others = _of_passages(vectors, rows)
    given = rows.scores
    if given.shape[1] == others.shape[1] + 1:
        given = given[:, :1] - given[:, 1:]
    return functional.mse_loss(own - others, given.to(own.dtype))


def kl(vectors: Tensor, rows: Layout, settings: EmbeddingSettings) -> Tensor:
    """KL from the teacher's softmax over a row's passages to the student's, times temperature²."""
    temperature = settings.usual_temperature
    scores = torch.cat(_of_passages(vectors, rows), 1) / temperature
    given = (rows.scores.to(scores.dtype) / temperature).softmax(1)
    return functional.kl_div(scores.log_softmax(1), given, reduction="batchmean") * temperature**2


def _of_passages(vectors: Tensor, rows: Layout) -> tuple[Tensor, Tensor]:
    """(rows, 1) and (rows, others): similarities of each query to its first and its further passages."""
    queries = vectors[rows.queries]
    own = (queries * vectors[rows.passages]).sum(1)
    others = (queries[rows.owners] * vectors[rows.others]).sum(1)
    return own[:, None], others.view(len(queries), -1)


LOSSES: dict[str, VectorLoss] = {
    "infonce": infonce,
    "cosent": cosent,
    "angle": angle,
    "supcon": supcon,
    "margin-mse": margin_mse,
    "kl": kl,
}


def loss_of_step(vectors: Tensor, rows: Sequence[TextGroup], settings: EmbeddingSettings, *, normalize: bool) -> Tensor:
    """The mean loss over rows, summed over the asked numbers of dimensions (arXiv 2205.13147).

    Args:
        vectors: (texts, width), pooled, of each row's query and passages in turn.
        normalize: whether the model's vectors have length 1; with cosine similarity they always do here.
    """
    layout = Layout.of(rows, vectors.device)
    settings = settings.model_copy(update={"loss": loss_for(rows, settings)})
    loss = LOSSES[settings.loss]
    cosine = settings.usual_similarity == "cosine"
    total = vectors.new_zeros(())
    for count in settings.dimensions or [vectors.shape[1]]:
        part = vectors[:, :count]
        total = total + loss(functional.normalize(part, dim=1) if cosine or normalize else part, layout, settings)
    return total


def loss_for(rows: Sequence[TextGroup], settings: EmbeddingSettings) -> str:
    """The loss of rows like these, as asked or by what they have.

    Raises:
        UserError: the rows lack what the loss needs, or have different numbers of scores.
    """
    first = rows[0]
    other = next((row for row in rows if len(row.scores) != len(first.scores)), None)
    if other is not None:
        what = f"row {first.row} has {len(first.scores)} scores, and row {other.row} {len(other.scores)}"
        raise UserError(what, where="data", hint="give each row as many passages")
    passages, scores = len(first.rows) - 1, len(first.scores)
    if first.label is not None:
        usual = "supcon"
    elif not scores:
        usual = "infonce"
    elif passages == 1:
        usual = "cosent"
    else:
        usual = "margin-mse" if scores == 1 else "kl"
    chosen = usual if settings.loss == "auto" else settings.loss
    fits = {usual, *{"cosent": {"angle"}, "kl": {"margin-mse"}}.get(usual, set())}
    if chosen not in fits:
        have = "a class" if first.label is not None else f"{passages} passages and {scores} scores"
        hint = f"set embedding.loss: {usual}, or other columns"
        raise UserError(f"the loss '{chosen}' does not fit rows with {have}", where="embedding.loss", hint=hint)
    return chosen
