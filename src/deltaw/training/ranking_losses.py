"""Losses of a reranker: of each score alone, of which of two passages is better, or of all passages of a query.

As sentence-transformers' cross-encoders have them. A loss takes one query's scores and labels, fp32 or fp64
(passages,), and gives their sum; :data:`UNITS` says what the sum over a step is divided by. Knows no model and no
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

Name: TypeAlias = Literal["binary", "pairwise", "listwise", "contrastive"]


def binary(scores: Tensor, labels: Tensor) -> Tensor:
    """−y log σ(s) − (1−y) log(1−σ(s)) of labels between 0 and 1, of one query's passages or of many."""
    return binary_cross_entropy_with_logits(scores, labels, reduction="sum")


def pairwise(scores: Tensor, labels: Tensor) -> Tensor:
    """−log₂ σ(s − s′) over pairs of passages of which the first has the higher label (RankNet; Burges et al. 2005,
    "Learning to rank using gradient descent")."""
    better = labels[:, None] > labels
    return -logsigmoid((scores[:, None] - scores)[better]).sum() / math.log(2)


def listwise(scores: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of softmax(s) under softmax(y) (ListNet's top one; Cao et al. 2007, "Learning to rank: from
    pairwise approach to listwise approach")."""
    return -(labels.softmax(0) * scores.log_softmax(0)).sum()


def contrastive(scores: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(s) of the right passage; of several, their mean by label (localized contrastive estimation,
    arXiv 2101.08751, eq. 3)."""
    return -(labels / labels.sum() * scores.log_softmax(0)).sum()


LOSSES: dict[Name, Callable[[Tensor, Tensor], Tensor]] = {
    "binary": binary,
    "pairwise": pairwise,
    "listwise": listwise,
    "contrastive": contrastive,
}
# A query's share of what a step is divided by: passages, pairs of them with different labels, or the query.
UNITS: dict[Name, Callable[[Sequence[float]], int]] = {
    "binary": len,
    "pairwise": lambda labels: sum(one > other for one in labels for other in labels),
    "listwise": lambda labels: 1,
    "contrastive": lambda labels: 1,
}


def loss_of_queries(name: Name, scores: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sum of a loss over queries, a scalar.

    Args:
        scores, labels: (passages,), a query's one after the other. sizes: passages of each query.
    """
    if name == "binary":
        return binary(scores, labels)
    parts = zip(scores.split(list(sizes)), labels.split(list(sizes)), strict=True)
    return torch.stack([LOSSES[name](*part) for part in parts]).sum()
