"""Exact search over vectors, and how good a ranking is: nDCG, reciprocal rank, recall, accuracy of pairs.

Vectors and places in, numbers out. A place is a passage's index. It knows no models and no texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.training.evaluation.base import Evaluation, Interval, check_finite, mean_interval

# Passages compared at once, and scores that are held at once: 64 MB.
BLOCK, SCORES = 2**14, 2**24
MAIN = "ndcg@10"
# What is relevant to a query: places, or places with grades, of which those above 0 are relevant.
Relevant = Collection[int] | Mapping[int, float]


def nearest(queries: Tensor, passages: Tensor, count: int, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The passages of the highest inner products with each query, found by computing all of them.

    Products are those of fp32: where they differ by less than its rounding, the order may be either. Of equal ones
    the lower place comes first, also among passages that did not make it into the list.

    Args:
        queries: (q, d) and passages: (n, d), fp32 on one device; of length 1 if cosines are meant.
        count: passages for each query; all of them if there are fewer.
        block: passages compared at once; memory is bounded by :data:`SCORES` whatever q and n are.

    Returns:
        scores fp32 and places int64, both (q, min(count, n)), the best first.

    Raises:
        UserError: a vector is not finite.
    """
    count = min(count, len(passages))
    scores = queries.new_empty(len(queries), count)
    places = torch.empty_like(scores, dtype=torch.int64)
    rows = max(1, SCORES // max(1, min(block, len(passages))))
    for name, vectors in (("query", queries), ("passage", passages)):
        for part in vectors.split(block):
            check_finite(f"the vector of a {name} is", part.numpy(force=True))
    for begin in range(0, len(queries), rows):
        part = queries[begin : begin + rows]
        best, at = scores[begin : begin + rows, :0], places[begin : begin + rows, :0]
        for start in range(0, len(passages) if count else 0, block):
            found, local = _top(part @ passages[start : start + block].T, count)
            best, at = _merged((best, at), (found, local + start), count)
        scores[begin : begin + rows], places[begin : begin + rows] = best, at
    return scores, places


def nearest_of_parts(queries: Tensor, parts: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Search passages that arrive in parts, with the result of :func:`nearest` over all of them.

    Args:
        queries: (q, d), as for :func:`nearest`.
        parts: (n, d) passages each. Only one part is in memory at a time.
        count: Passages to return for each query.
    """
    best = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    start = 0
    for part in parts:
        scores, places = nearest(queries, part, count)
        best = _merged(best, (scores, places + start), count)
        start += len(part)
    return best


def _merged(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Merge two rankings; the places of the first are lower, so a stable sort keeps them first among equal scores."""
    best, order = torch.cat([before[0], after[0]], 1).sort(dim=1, descending=True, stable=True)
    return best[:, :count], torch.cat([before[1], after[1]], 1).gather(1, order)[:, :count]


def _top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest scores of each row and their columns, equal ones in the order of their columns."""
    wide = scores.shape[1]
    count = min(count, wide)
    best, columns = scores.topk(min(count + 1, wide), 1)
    # Which of several equal scores topk takes is left open, so rows whose last place is contested are sorted.
    contested = (best[:, count - 1] == best[:, -1]).nonzero().flatten() if wide > count else columns.new_empty(0)
    columns = columns[:, :count].sort(1).values
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if len(contested):
        whole, order = scores[contested].sort(dim=1, descending=True, stable=True)
        best[contested], columns[contested] = whole[:, :count], order[:, :count]
    return best, columns


def ranking_metrics(
    places: np.ndarray, relevant: Sequence[Relevant], *, cutoffs: Sequence[int] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """``ndcg@k``, ``mrr@k`` and ``recall@k`` of each query.

    nDCG is the sum of grade / log2(rank + 1) over the first k ranks, divided by the most that it could be (Järvelin
    and Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques", with the discount from rank 2 on).

    Args:
        places: (q, depth) passages by rank, the best first; fewer than k count as if nothing relevant followed.
        relevant: of each query. cutoffs: the k.

    Returns:
        fp64 (q,) for each metric.

    Raises:
        UserError: nothing is relevant to a query.
    """
    grades = [found if isinstance(found, Mapping) else dict.fromkeys(found, 1.0) for found in relevant]
    grades = [{place: grade for place, grade in of_one.items() if grade > 0} for of_one in grades]
    if empty := [number for number, of_one in enumerate(grades) if not of_one]:
        raise UserError("no passage is relevant to a query", where=f"query {empty[0]}", hint="leave such queries out")
    places, gains = np.asarray(places), np.zeros(np.shape(places))
    for row, (ranked, of_one) in enumerate(zip(places.tolist(), grades, strict=True)):
        gains[row] = [of_one.get(place, 0.0) for place in ranked]
    hits = gains > 0
    total = np.array([len(of_one) for of_one in grades], np.float64)
    found: dict[str, np.ndarray] = {}
    for k in cutoffs:
        best = [sorted(of_one.values(), reverse=True)[:k] @ _discounts(min(k, len(of_one))) for of_one in grades]
        seen = hits[:, :k]
        found[f"ndcg@{k}"] = gains[:, :k] @ _discounts(seen.shape[1]) / np.array(best)
        found[f"mrr@{k}"] = np.where(seen.any(1), 1.0 / (1 + seen.argmax(1)), 0.0)
        found[f"recall@{k}"] = seen.sum(1) / total
    return found


def _discounts(count: int) -> np.ndarray:
    """(count,) 1 / log2(rank + 1) for the ranks from 1 on."""
    return 1.0 / np.log2(np.arange(2, count + 2))


def retrieval_evaluation(
    places: np.ndarray, relevant: Sequence[Relevant], *, cutoffs: Sequence[int] = (1, 5, 10)
) -> Evaluation:
    """The means over queries of :func:`ranking_metrics`, each with its interval; nDCG@10 is the one that counts.

    Raises:
        UserError: nothing is relevant to a query.
    """
    if not len(relevant):
        return Evaluation()
    rows = ranking_metrics(places, relevant, cutoffs=sorted({*cutoffs, 10}))
    intervals = {name: bounds for name, of_queries in rows.items() if (bounds := _interval(of_queries)) is not None}
    metrics = {name: float(of_queries.mean()) for name, of_queries in rows.items()}
    return Evaluation(metrics, MAIN, per_row=rows[MAIN], interval=intervals.pop(MAIN, None), intervals=intervals)


def _interval(rows: np.ndarray) -> Interval | None:
    """Of the mean of rows between 0 and 1; of rows that are all one or the other it is that of a share."""
    bounds = mean_interval(rows, share=bool(np.isin(rows, (0.0, 1.0)).all()))
    return None if bounds is None else (bounds[0], min(1.0, bounds[1]))


def pair_accuracy(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Whether each row's positive scores above its negatives: 1, 0, or 0.5 for equal scores.

    Args:
        positive: (n,). negative: (n,), or (n, m) of m negatives, whose mean is returned.

    Returns:
        fp64 (n,), whose mean is the accuracy.

    Raises:
        UserError: a score is not finite.
    """
    check_finite("a score is", positive)
    check_finite("a score is", negative)
    difference = np.asarray(positive, np.float64)[:, None] - np.asarray(negative, np.float64).reshape(len(positive), -1)
    return ((np.sign(difference) + 1) / 2).mean(1)


def neighbor_agreement(before: Tensor, after: Tensor, count: int = 10) -> float:
    """How much of each text's neighborhood two models agree on: the mean of :func:`shared_neighbors`."""
    return float(shared_neighbors(before, after, count).mean())


def shared_neighbors(before: Tensor, after: Tensor, count: int = 10) -> np.ndarray:
    """The share of each text's nearest other texts that is the same in two sets of vectors.

    Args:
        before: (n, d) and after: (n, e), fp32, of the same n texts in the same order.
        count: neighbors of a text; all others if there are fewer.

    Returns:
        fp64 (n,), 1 where the neighbors are the same, in any order.

    Raises:
        UserError: there are fewer than two texts, or a vector is not finite.
    """
    if len(before) < 2 or len(before) != len(after):
        raise UserError("neighbors need two sets of vectors of the same texts, two or more", where="drift")
    left, right = (_others(vectors, count) for vectors in (before, after))
    return np.array([len(set(a) & set(b)) / len(a) for a, b in zip(left, right, strict=True)])


def _others(vectors: Tensor, count: int) -> list[list[int]]:
    """The nearest texts of each, itself left out."""
    _, places = nearest(vectors, vectors, count + 1)
    own = places == torch.arange(len(places), device=places.device)[:, None]
    own[~own.any(1), -1] = True  # where more texts are equal to it than fit
    return places[~own].view(len(places), -1).tolist()
