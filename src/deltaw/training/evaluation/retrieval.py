"""Exact vector search and ranking metrics: nDCG, reciprocal rank, recall and pair accuracy."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.training.evaluation.base import Evaluation, Interval, check_finite, mean_interval

# Passages per block, and maximum number of scores in memory (64 MB).
BLOCK_PASSAGES = 2**14
MAX_SCORES = 2**24
MAIN_METRIC = "ndcg@10"
# Relevant passages of a query: indices, or grades by index. Passages with a grade above 0 are relevant.
Relevant = Collection[int] | Mapping[int, float]


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


def ranking_metrics(
    ranked: np.ndarray, relevant: Sequence[Relevant], *, cutoffs: Sequence[int] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """Return ``ndcg@k``, ``mrr@k`` and ``recall@k`` of each query.

    nDCG is the sum of grade / log2(rank + 1) over the first k ranks, divided by its maximum (Järvelin and Kekäläinen
    2002, "Cumulated gain-based evaluation of IR techniques"; log2(rank + 1) is used for all ranks).

    Args:
        ranked: (q, depth) passage indices, best first. Missing ranks count as irrelevant.
        relevant: Relevant passages of each query.
        cutoffs: Values of k.

    Returns:
        fp64 (q,) per metric.

    Raises:
        UserError: if a query has no relevant passage.
    """
    grades = [passages if isinstance(passages, Mapping) else dict.fromkeys(passages, 1.0) for passages in relevant]
    grades = [{index: grade for index, grade in query_grades.items() if grade > 0} for query_grades in grades]
    if empty := [query for query, query_grades in enumerate(grades) if not query_grades]:
        raise UserError("no passage is relevant to a query", location=f"query {empty[0]}", hint="remove such queries")
    ranked = np.asarray(ranked)
    gains = np.zeros(ranked.shape)
    for row, (row_ranking, query_grades) in enumerate(zip(ranked.tolist(), grades, strict=True)):
        gains[row] = [query_grades.get(index, 0.0) for index in row_ranking]
    hits = gains > 0
    total = np.array([len(query_grades) for query_grades in grades], np.float64)
    metrics: dict[str, np.ndarray] = {}
    for k in cutoffs:
        best = [sorted(q.values(), reverse=True)[:k] @ _discounts(min(k, len(q))) for q in grades]
        top_hits = hits[:, :k]
        metrics[f"ndcg@{k}"] = gains[:, :k] @ _discounts(top_hits.shape[1]) / np.array(best)
        metrics[f"mrr@{k}"] = np.where(top_hits.any(1), 1.0 / (1 + top_hits.argmax(1)), 0.0)
        metrics[f"recall@{k}"] = top_hits.sum(1) / total
    return metrics


def _discounts(count: int) -> np.ndarray:
    """Return (count,) 1 / log2(rank + 1) for ranks from 1 on."""
    return 1.0 / np.log2(np.arange(2, count + 2))


def retrieval_evaluation(
    ranked: np.ndarray, relevant: Sequence[Relevant], *, cutoffs: Sequence[int] = (1, 5, 10)
) -> Evaluation:
    """Return the means of :func:`ranking_metrics` over queries with their intervals. The primary metric is nDCG@10.

    Raises:
        UserError: if a query has no relevant passage.
    """
    if not len(relevant):
        return Evaluation()
    rows = ranking_metrics(ranked, relevant, cutoffs=sorted({*cutoffs, 10}))
    intervals = {name: bounds for name, values in rows.items() if (bounds := _interval(values)) is not None}
    metrics = {name: float(values.mean()) for name, values in rows.items()}
    per_row = rows[MAIN_METRIC]
    interval = intervals.pop(MAIN_METRIC, None)
    return Evaluation(metrics, MAIN_METRIC, per_row=per_row, interval=interval, intervals=intervals)


def _interval(rows: np.ndarray) -> Interval | None:
    """Return the interval of a mean of values between 0 and 1, which is a share if all values are 0 or 1."""
    bounds = mean_interval(rows, share=bool(np.isin(rows, (0.0, 1.0)).all()))
    return None if bounds is None else (bounds[0], min(1.0, bounds[1]))


def pair_accuracy(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return 1 if a row's positive has a higher score than its negatives, 0 if lower, and 0.5 if equal.

    Args:
        positive: (n,).
        negative: (n,), or (n, m) for m negatives, over which the result is averaged.

    Returns:
        fp64 (n,) with the accuracy as mean.

    Raises:
        UserError: if a score is not finite.
    """
    check_finite("a score is", positive)
    check_finite("a score is", negative)
    difference = np.asarray(positive, np.float64)[:, None] - np.asarray(negative, np.float64).reshape(len(positive), -1)
    return np.asarray(((np.sign(difference) + 1) / 2).mean(1))


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
