"""Ranking losses of rerankers: pointwise, pairwise, listwise and contrastive.

They match sentence-transformers' cross-encoders. A loss takes the scores and labels of one query, fp32 or fp64
(passages,), and returns their sum. :data:`UNITS` defines the divisor of the sum over a step.
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
    """−y log σ(s) − (1−y) log(1−σ(s)) of labels between 0 and 1, for passages of one or several queries."""
    return binary_cross_entropy_with_logits(scores, labels, reduction="sum")


def pairwise(scores: Tensor, labels: Tensor) -> Tensor:
    """−log₂ σ(s − s′) over pairs of passages whose first has the higher label (RankNet).

    Burges et al. 2005, "Learning to rank using gradient descent".
    """
    better = labels[:, None] > labels
    return -logsigmoid((scores[:, None] - scores)[better]).sum() / math.log(2)


def listwise(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of softmax(s) under softmax(y) (ListNet's top-one loss).

    Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach".
    """
    return -(labels.softmax(0) * scores.log_softmax(0)).sum()


def contrastive(scores: Tensor, labels: Tensor) -> Tensor:
    """−log softmax(s) of the positive passage, or the label-weighted mean over several.

    Localized contrastive estimation, arXiv 2101.08751, eq. 3.
    """
    return -(labels / labels.sum() * scores.log_softmax(0)).sum()


LOSSES: dict[Name, Callable[[Tensor, Tensor], Tensor]] = {"binary": binary, "pairwise": pairwise}
LOSSES |= {"listwise": listwise, "contrastive": contrastive}
# Units of a query: its passages, its pairs of passages with different labels, or the query itself.
UNITS: dict[Name, Callable[[Sequence[float]], int]] = {"binary": len, "listwise": lambda labels: 1}
UNITS |= {"pairwise": lambda labels: sum(one > other for one in labels for other in labels)}
UNITS |= {"contrastive": lambda labels: 1}


def loss_of_queries(name: Name, scores: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the summed loss over queries, a scalar.

    Args:
        name: Name of the loss.
        scores: (passages,) scores, query by query.
        labels: (passages,) labels in the same order.
        sizes: Number of passages of each query.
    """
    if name == "binary":
        return binary(scores, labels)
    parts = zip(scores.split(list(sizes)), labels.split(list(sizes)), strict=True)
    return torch.stack([LOSSES[name](*part) for part in parts]).sum()
