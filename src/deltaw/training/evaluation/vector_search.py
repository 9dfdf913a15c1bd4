"""Exact search for the vectors with the highest inner products."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deltaw.training.evaluation.base import check_finite

# Passages per block, and maximum number of scores in memory (64 MB).
BLOCK_PASSAGES = 2**14
MAX_SCORES = 2**24


def nearest(queries: Tensor, passages: Tensor, count: int, *, block: int = BLOCK_PASSAGES) -> tuple[Tensor, Tensor]:
    """Return the passages with the highest inner products per query, by exhaustive search.

    Products are computed in fp32, so the order of products that differ by less than its rounding is undefined. Among
    equal products, lower indices are first, also if not all of them are returned.

    Args:
        queries: (q, d) fp32, normalized for cosine similarity.
        passages: (n, d) fp32 on the device of the queries, normalized for cosine similarity.
        count: Number of passages per query. All passages, if fewer.
        block: Passages per block. Memory is bounded by :data:`MAX_SCORES` for any q and n.

    Returns:
        Scores (fp32) and passage indices (int64), both (q, min(count, n)), best first.

    Raises:
        UserError: if a vector is not finite.
    """
    count = min(count, len(passages))
    scores = queries.new_empty(len(queries), count)
    indices = torch.empty_like(scores, dtype=torch.int64)
    rows = max(1, MAX_SCORES // max(1, min(block, len(passages))))
    for name, vectors in (("query", queries), ("passage", passages)):
        for part in vectors.split(block):
            check_finite(f"the vector of a {name} is", part.numpy(force=True))
    for row_start in range(0, len(queries), rows):
        part = queries[row_start : row_start + rows]
        best = scores[row_start : row_start + rows, :0]
        best_indices = indices[row_start : row_start + rows, :0]
        for start in range(0, len(passages) if count else 0, block):
            block_scores, local = _top(part @ passages[start : start + block].T, count)
            best, best_indices = _merge((best, best_indices), (block_scores, local + start), count)
        scores[row_start : row_start + rows] = best
        indices[row_start : row_start + rows] = best_indices
    return scores, indices


def nearest_of_parts(queries: Tensor, parts: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Search passages that arrive in parts. Equivalent to :func:`nearest` over all of them.

    Args:
        queries: (q, d), as for :func:`nearest`.
        parts: (n, d) passages each. Only one part is in memory at a time.
        count: Number of passages per query.
    """
    best = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    start = 0
    for part in parts:
        scores, indices = nearest(queries, part, count)
        best = _merge(best, (scores, indices + start), count)
        start += len(part)
    return best


def _merge(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Merge two rankings. Indices of the first are lower, so a stable sort ranks them first for equal scores."""
    best, order = torch.cat([before[0], after[0]], 1).sort(dim=1, descending=True, stable=True)
    return best[:, :count], torch.cat([before[1], after[1]], 1).gather(1, order)[:, :count]


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest scores of each row and their columns. Equal scores are ordered by column."""
    width = scores.shape[1]
    count = min(count, width)
    best, columns = scores.topk(min(count + 1, width), 1)
    # topk chooses arbitrarily between equal scores, so rows with a tie at the last rank are sorted.
    contested = (best[:, count - 1] == best[:, -1]).nonzero().flatten() if width > count else columns.new_empty(0)
    columns = columns[:, :count].sort(1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if len(contested):
        sorted_scores, order = scores[contested].sort(dim=1, descending=True, stable=True)
        best[contested] = sorted_scores[:, :count]
        columns[contested] = order[:, :count]
    return best, columns
