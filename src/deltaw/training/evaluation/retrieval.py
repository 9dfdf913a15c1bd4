"""Metrics of rankings: nDCG, reciprocal rank, recall and pair accuracy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from deltaw.errors import UserError
from deltaw.training.evaluation.base import Evaluation, Interval, check_finite, mean_interval

MAIN_METRIC = "ndcg@10"
# Relevant passages of a query: indices, or grades by index. Passages with a grade above 0 are relevant.
Relevant = Collection[int] | Mapping[int, float]


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
