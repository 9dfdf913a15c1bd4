"""Change of nearest neighbors between two sets of vectors of the same texts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.training.evaluation.vector_search import nearest


def neighbor_agreement(before: Tensor, after: Tensor, count: int = 10) -> float:
    """Return the mean of :func:`shared_neighbors`."""
    return float(shared_neighbors(before, after, count).mean())


def shared_neighbors(before: Tensor, after: Tensor, count: int = 10) -> np.ndarray:
    """Return the share of each text's nearest neighbors that is the same in two sets of vectors.

    Args:
        before: (n, d) fp32.
        after: (n, e) fp32 of the same n texts in the same order.
        count: Number of neighbors of a text. All other texts, if fewer.

    Returns:
        fp64 (n,), 1 if all neighbors are the same, in any order.

    Raises:
        UserError: for fewer than two texts, or if a vector is not finite.
    """
    if len(before) < 2 or len(before) != len(after):
        message = "comparing neighbors requires two sets of vectors of the same texts, at least two"
        raise UserError(message, location="drift")
    first, second = (_nearest_others(vectors, count) for vectors in (before, after))
    return np.array([len(set(a) & set(b)) / len(a) for a, b in zip(first, second, strict=True)])


def _nearest_others(vectors: Tensor, count: int) -> list[list[int]]:
    """Return the nearest other texts of each text."""
    _, indices = nearest(vectors, vectors, count + 1)
    is_self = indices == torch.arange(len(indices), device=indices.device)[:, None]
    is_self[~is_self.any(1), -1] = True  # if more than count texts are equal to the text
    return indices[~is_self].view(len(indices), -1).tolist()
