"""Exact search matches float64, and ranking metrics match manual values and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.training.evaluation import vector_search
from deltaw.training.evaluation.base import bootstrap_interval, spearman
from deltaw.training.evaluation.neighbors import neighbor_agreement, shared_neighbors
from deltaw.training.evaluation.retrieval import pair_accuracy, ranking_metrics, retrieval_evaluation
from deltaw.training.evaluation.vector_search import nearest, nearest_of_parts
from tests.conftest import refusal


def random_vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(queries: torch.Tensor, passages: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 scores and indices of the best passages. Ties are ordered by index."""
    scores = queries.double().numpy() @ passages.double().numpy().T
    indices = np.lexsort((np.broadcast_to(np.arange(len(passages)), scores.shape), -scores), axis=1)[:, :count]
    return np.take_along_axis(scores, indices, 1), indices


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_nearest_matches_float64_products(block, monkeypatch):
    monkeypatch.setattr(vector_search, "MAX_SCORES", 5 * block)  # several parts of the queries, too
    queries = random_vectors(23, 12, seed=1)
    passages = random_vectors(211, 12, seed=2)
    scores, indices = nearest(queries, passages, 17, block=block)
    expected, expected_indices = brute_force(queries, passages, 17)
    assert (indices.numpy() == expected_indices).all()
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 9), st.integers(0, 999))
def test_tied_scores_are_ordered_by_index(num_passages, count, block, seed):
    """Products of small integers are exact, which produces ties."""
    random = torch.Generator().manual_seed(seed)
    queries, passages = (torch.randint(-1, 2, (n, 3), generator=random).float() for n in (5, num_passages))
    scores, indices = nearest(queries, passages, count, block=block)
    expected, expected_indices = brute_force(queries, passages, count)
    assert (indices.numpy() == expected_indices).all() and (scores.numpy() == expected).all()


def test_non_finite_vectors_raise_and_empty_search_returns_empty():
    scores, indices = nearest(random_vectors(3, 4), torch.empty(0, 4), 5)
    assert scores.shape == indices.shape == (3, 0)
    broken = random_vectors(9, 4)
    broken[8, 2] = float("nan")
    for queries, passages in ((broken, random_vectors(2, 4)), (random_vectors(2, 4), broken)):
        refusal(nearest, queries, passages, 1, match="not finite")


def test_metrics_match_manual_values():
    """Two relevant passages at ranks 2 and 5, one at rank 1, and one that is not ranked."""
    indices = np.array([[9, 3, 8, 7, 4], [5, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    metrics = ranking_metrics(indices, [{3, 4}, [5], {77}], cutoffs=(1, 3, 5))
    second = 1 / math.log2(3)
    fifth = 1 / math.log2(6)
    first_row = {"ndcg@1": 0, "ndcg@3": second / (1 + second), "ndcg@5": (second + fifth) / (1 + second)}
    first_row |= {"mrr@1": 0, "mrr@3": 0.5, "mrr@5": 0.5, "recall@1": 0, "recall@3": 0.5, "recall@5": 1}
    expected = {name: [value, 1, 0] for name, value in first_row.items()}
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(metrics[name], values, atol=1e-12, err_msg=name)
    # A list can be shorter than k.
    assert ranking_metrics(indices[:, :2], [{3, 4}, [5], {77}], cutoffs=(5,))["recall@5"].tolist() == [0.5, 1, 0]


def test_metrics_weight_grades_and_ignore_grade_zero():
    grades = {1: 3.0, 2: 1.0, 3: 0.0}
    metrics = ranking_metrics(np.array([[3, 2, 1]]), [grades], cutoffs=(3,))
    ideal = 3 + 1 / math.log2(3)
    assert metrics["ndcg@3"][0] == pytest.approx((1 / math.log2(3) + 3 / 2) / ideal)
    assert (metrics["mrr@3"][0], metrics["recall@3"][0]) == (0.5, 1.0)
    error = refusal(ranking_metrics, np.array([[1], [1]]), [grades, {3: 0.0}], match="no passage is relevant")
    assert error.location == "query 1"


def rankings(count: int = 40, passages: int = 30) -> tuple[np.ndarray, list[dict[int, float]]]:
    """Return random rankings and random grades of one to six passages."""
    random = np.random.default_rng(0)
    indices = np.stack([random.permutation(passages) for _ in range(count)])
    chosen = [random.choice(passages, random.integers(1, 7), replace=False) for _ in range(count)]
    return indices, [{int(index): float(random.integers(1, 4)) for index in query_grades} for query_grades in chosen]


def test_metrics_match_ranx():
    # ranx orders queries by name.
    ranx = pytest.importorskip("ranx", reason="ranx is not installed")
    indices, grades = rankings()
    qrels = {f"{q:03}": {str(p): int(g) for p, g in query_grades.items()} for q, query_grades in enumerate(grades)}
    scored = {f"{q:03}": {str(p): 1.0 - r / 99 for r, p in enumerate(row)} for q, row in enumerate(indices)}
    metrics = ranking_metrics(indices, grades, cutoffs=(1, 5, 10))
    ours = {"ndcg": "ndcg", "mrr": "mrr", "recall": "recall"}
    for k in (1, 5, 10):
        for name, theirs in ours.items():
            expected = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(scored), f"{theirs}@{k}", return_mean=False)
            np.testing.assert_allclose(metrics[f"{name}@{k}"], expected, atol=1e-9, err_msg=f"{name}@{k}")


def test_evaluation_has_means_and_intervals_over_queries():
    indices, grades = rankings()
    evaluation = retrieval_evaluation(indices, grades, cutoffs=(1, 5))
    rows = ranking_metrics(indices, grades)
    assert evaluation.main == "ndcg@10"
    assert evaluation.metrics.keys() == rows.keys() == evaluation.named_intervals().keys()
    for name, (low, high) in evaluation.named_intervals().items():
        assert evaluation.metrics[name] == pytest.approx(rows[name].mean())
        assert 0 <= low < evaluation.metrics[name] < high <= 1, name
    # The interval is about as wide as the variation of the mean over samples of queries.
    assert evaluation.interval == pytest.approx(bootstrap_interval(np.mean, rows["ndcg@10"]), abs=0.03)
    perfect = retrieval_evaluation(np.arange(20)[:, None], [{n} for n in range(20)])
    assert perfect.metrics["ndcg@10"] == 1 and perfect.interval[0] == pytest.approx(0.84, abs=0.01)
    assert retrieval_evaluation(np.empty((0, 5)), []).metrics == {}


def test_pair_accuracy_counts_ties_as_half():
    assert pair_accuracy(np.array([0.5, 0.5, 0.5]), np.array([0.4, 0.5, 0.6])).tolist() == [1, 0.5, 0]
    assert pair_accuracy(np.array([0.5]), np.array([[0.4, 0.5, 0.6, 0.1]])).tolist() == [2.5 / 4]
    refusal(pair_accuracy, np.array([1.0]), np.array([math.nan]), match="not finite")


def test_spearman_interval_covers_true_correlation():
    random = np.random.default_rng(1)
    queries = random.normal(size=(100, 60))
    passages = 0.6 * queries + 0.8 * random.normal(size=queries.shape)
    true_correlation = 6 / math.pi * math.asin(0.6 / 2)  # of the normal distribution with that correlation
    bounds = [bootstrap_interval(spearman, *pair, draws=100) for pair in zip(queries, passages, strict=True)]
    assert 0.88 <= np.mean([low <= true_correlation <= high for low, high in bounds]) <= 0.99
    pair = queries[0], passages[0]
    assert bootstrap_interval(spearman, *pair) == bootstrap_interval(spearman, *pair)
    assert bootstrap_interval(spearman, np.ones(5), np.arange(5)) is None


def test_neighbor_agreement_is_one_after_rotation_and_chance_for_random_vectors():
    vectors = random_vectors(60, 16)
    rotated = vectors @ torch.linalg.qr(random_vectors(16, 16, seed=3)).Q
    assert neighbor_agreement(vectors, rotated, 5) == 1
    assert neighbor_agreement(vectors, random_vectors(60, 8, seed=4), 5) == pytest.approx(5 / 59, abs=0.06)
    assert neighbor_agreement(vectors, random_vectors(60, 8, seed=4), 100) == 1, "all others, in any order"


def test_text_is_not_neighbor_of_itself_even_with_duplicates():
    """On a line, by cosine: 0 and 1 are equal, 2 is near them, and 3 and 4 are far from all three."""
    angles = torch.tensor([0.0, 0.0, 0.1, 1.5, 1.6])
    before = torch.stack([angles.cos(), angles.sin()], 1)
    after = before.clone()
    after[2] = after[4]  # 2 moves to 4
    # Nearest two before: 0: 1 2, 1: 0 2, 2: 0 1, 3: 4 2, 4: 3 2. Afterwards 2 equals 4.
    assert shared_neighbors(before, before, 2).tolist() == [1] * 5
    assert shared_neighbors(before, after, 2).tolist() == [0.5, 0.5, 0, 1, 1]
    equal_vectors = torch.ones(6, 2)
    assert shared_neighbors(equal_vectors, equal_vectors, 2).tolist() == [1] * 6
    refusal(shared_neighbors, before, after[:4], match="two sets of vectors")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 999))
def test_search_in_parts_equals_full_search(sizes, count, seed):
    """Small integers produce ties, so the order of equal scores is compared as well."""
    random = torch.Generator().manual_seed(seed)
    passages = torch.randint(-1, 2, (sum(sizes), 3), generator=random).float()
    queries = torch.randint(-1, 2, (4, 3), generator=random).float()
    scores, indices = nearest_of_parts(queries, iter(passages.split(sizes)), count)
    expected, expected_indices = nearest(queries, passages, count)
    assert torch.equal(scores, expected) and torch.equal(indices, expected_indices)
