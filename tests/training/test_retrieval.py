"""Exact search against float64, and metrics of rankings against values by hand and other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import UserError
from deltaw.training.evaluation import retrieval
from deltaw.training.evaluation.base import bootstrap_interval, spearman
from deltaw.training.evaluation.retrieval import (
    nearest,
    nearest_of_parts,
    neighbor_agreement,
    pair_accuracy,
    ranking_metrics,
    retrieval_evaluation,
    shared_neighbors,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def brute_force(queries: torch.Tensor, passages: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 and places, equal scores by place."""
    scores = queries.double().numpy() @ passages.double().numpy().T
    places = np.lexsort((np.broadcast_to(np.arange(len(passages)), scores.shape), -scores), axis=1)[:, :count]
    return np.take_along_axis(scores, places, 1), places


@pytest.mark.parametrize("block", [1, 7, 64, 4096])
def test_the_nearest_are_those_of_all_products_in_float64(block, monkeypatch):
    monkeypatch.setattr(retrieval, "SCORES", 5 * block)  # several parts of the queries, too
    queries, passages = drawn(23, 12, seed=1), drawn(211, 12, seed=2)
    scores, places = nearest(queries, passages, 17, block=block)
    expected, at = brute_force(queries, passages, 17)
    assert (places.numpy() == at).all()
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.integers(1, 9), st.integers(0, 999))
def test_of_equal_scores_the_lower_place_comes_first(passages, count, block, seed):
    """Small integers, whose products are exact, so that most scores are equal to others."""
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-1, 2, (n, 3), generator=random).float() for n in (5, passages))
    scores, places = nearest(left, right, count, block=block)
    expected, at = brute_force(left, right, count)
    assert (places.numpy() == at).all() and (scores.numpy() == expected).all()


def test_what_is_not_finite_is_refused_and_nothing_is_found_in_nothing():
    scores, places = nearest(drawn(3, 4), torch.empty(0, 4), 5)
    assert scores.shape == places.shape == (3, 0)
    broken = drawn(9, 4)
    broken[8, 2] = float("nan")
    for queries, passages in ((broken, drawn(2, 4)), (drawn(2, 4), broken)):
        with pytest.raises(UserError, match="not finite"):
            nearest(queries, passages, 1)


def test_metrics_are_those_by_hand():
    """Two relevant passages at ranks 2 and 5; one at rank 1; none found."""
    places = np.array([[9, 3, 8, 7, 4], [5, 1, 2, 3, 4], [1, 2, 3, 4, 5]])
    found = ranking_metrics(places, [{3, 4}, [5], {77}], cutoffs=(1, 3, 5))
    ideal = 1 + 1 / math.log2(3)
    expected = {
        "ndcg@1": [0, 1, 0],
        "ndcg@3": [1 / math.log2(3) / ideal, 1, 0],
        "ndcg@5": [(1 / math.log2(3) + 1 / math.log2(6)) / ideal, 1, 0],
        "mrr@1": [0, 1, 0],
        "mrr@3": [0.5, 1, 0],
        "mrr@5": [0.5, 1, 0],
        "recall@1": [0, 1, 0],
        "recall@3": [0.5, 1, 0],
        "recall@5": [1, 1, 0],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)
    # A list that is shorter than k holds nothing more.
    assert ranking_metrics(places[:, :2], [{3, 4}, [5], {77}], cutoffs=(5,))["recall@5"].tolist() == [0.5, 1, 0]


def test_grades_count_by_how_high_they_are_and_those_of_zero_not_at_all():
    grades = {1: 3.0, 2: 1.0, 3: 0.0}
    found = ranking_metrics(np.array([[3, 2, 1]]), [grades], cutoffs=(3,))
    ideal = 3 + 1 / math.log2(3)
    assert found["ndcg@3"][0] == pytest.approx((1 / math.log2(3) + 3 / 2) / ideal)
    assert (found["mrr@3"][0], found["recall@3"][0]) == (0.5, 1.0)
    with pytest.raises(UserError, match="no passage is relevant") as error:
        ranking_metrics(np.array([[1], [1]]), [grades, {3: 0.0}])
    assert error.value.where == "query 1"


def rankings(count: int = 40, passages: int = 30) -> tuple[np.ndarray, list[dict[int, float]]]:
    """Random rankings, and random grades of one to six passages."""
    random = np.random.default_rng(0)
    places = np.stack([random.permutation(passages) for _ in range(count)])
    chosen = [random.choice(passages, random.integers(1, 7), replace=False) for _ in range(count)]
    return places, [{int(place): float(random.integers(1, 4)) for place in of_one} for of_one in chosen]


def test_metrics_are_those_of_ranx():
    # It returns queries in the order of their names.
    ranx = pytest.importorskip("ranx", reason="ranx is not installed")
    places, grades = rankings()
    named = {f"{q:03}": {str(p): int(g) for p, g in of_one.items()} for q, of_one in enumerate(grades)}
    scored = {f"{q:03}": {str(p): 1.0 - r / 99 for r, p in enumerate(row)} for q, row in enumerate(places)}
    found = ranking_metrics(places, grades, cutoffs=(1, 5, 10))
    ours = {"ndcg": "ndcg", "mrr": "mrr", "recall": "recall"}
    for k in (1, 5, 10):
        for name, theirs in ours.items():
            expected = ranx.evaluate(ranx.Qrels(named), ranx.Run(scored), f"{theirs}@{k}", return_mean=False)
            np.testing.assert_allclose(found[f"{name}@{k}"], expected, atol=1e-9, err_msg=f"{name}@{k}")


def test_an_evaluation_has_means_with_intervals_over_queries():
    places, grades = rankings()
    found, rows = retrieval_evaluation(places, grades, cutoffs=(1, 5)), ranking_metrics(places, grades)
    assert found.main == "ndcg@10" and found.metrics.keys() == rows.keys() == found.named_intervals().keys()
    for name, (low, high) in found.named_intervals().items():
        assert found.metrics[name] == pytest.approx(rows[name].mean())
        assert 0 <= low < found.metrics[name] < high <= 1, name
    # The interval is about as wide as how much the mean moves if other queries are drawn.
    assert found.interval == pytest.approx(bootstrap_interval(np.mean, rows["ndcg@10"]), abs=0.03)
    perfect = retrieval_evaluation(np.arange(20)[:, None], [{n} for n in range(20)])
    assert perfect.metrics["ndcg@10"] == 1 and perfect.interval[0] == pytest.approx(0.84, abs=0.01)
    assert retrieval_evaluation(np.empty((0, 5)), []).metrics == {}


def test_accuracy_of_pairs_counts_equal_scores_by_half():
    assert pair_accuracy(np.array([0.5, 0.5, 0.5]), np.array([0.4, 0.5, 0.6])).tolist() == [1, 0.5, 0]
    assert pair_accuracy(np.array([0.5]), np.array([[0.4, 0.5, 0.6, 0.1]])).tolist() == [2.5 / 4]
    with pytest.raises(UserError, match="not finite"):
        pair_accuracy(np.array([1.0]), np.array([math.nan]))


def test_the_interval_of_spearman_has_the_correlation_of_all_rows_19_times_in_20():
    random = np.random.default_rng(1)
    left = random.normal(size=(200, 60))
    right = 0.6 * left + 0.8 * random.normal(size=left.shape)
    true = 6 / math.pi * math.asin(0.6 / 2)  # of the normal distribution with that correlation
    bounds = [bootstrap_interval(spearman, *pair, draws=200) for pair in zip(left, right, strict=True)]
    assert 0.88 <= np.mean([low <= true <= high for low, high in bounds]) <= 0.99
    assert bootstrap_interval(spearman, left[0], right[0]) == bootstrap_interval(spearman, left[0], right[0])
    assert bootstrap_interval(spearman, np.ones(5), np.arange(5)) is None


def test_agreement_of_neighbors_is_one_for_turned_vectors_and_chance_for_others():
    vectors = drawn(60, 16)
    turned = vectors @ torch.linalg.qr(drawn(16, 16, seed=3)).Q
    assert neighbor_agreement(vectors, turned, 5) == 1
    assert neighbor_agreement(vectors, drawn(60, 8, seed=4), 5) == pytest.approx(5 / 59, abs=0.06)
    assert neighbor_agreement(vectors, drawn(60, 8, seed=4), 100) == 1, "all others, in any order"


def test_a_text_is_not_its_own_neighbor_also_beside_equal_texts():
    """On a line, by cosine: 0 and 1 are equal, 2 is near them, 3 and 4 stand apart."""
    angles = torch.tensor([0.0, 0.0, 0.1, 1.5, 1.6])
    before = torch.stack([angles.cos(), angles.sin()], 1)
    after = before.clone()
    after[2] = after[4]  # 2 moves to the others
    # Nearest two before: 0: 1 2, 1: 0 2, 2: 0 1, 3: 4 2, 4: 3 2; after, 2 stands at 4.
    assert shared_neighbors(before, before, 2).tolist() == [1] * 5
    assert shared_neighbors(before, after, 2).tolist() == [0.5, 0.5, 0, 1, 1]
    same = torch.ones(6, 2)
    assert shared_neighbors(same, same, 2).tolist() == [1] * 6
    with pytest.raises(UserError, match="two sets of vectors"):
        shared_neighbors(before, after[:4])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 999))
def test_a_search_in_parts_equals_a_search_over_all_passages(sizes, count, seed):
    """Small integers, so that many scores are equal and the order of equal scores is compared, too."""
    random = torch.Generator().manual_seed(seed)
    passages = torch.randint(-1, 2, (sum(sizes), 3), generator=random).float()
    queries = torch.randint(-1, 2, (4, 3), generator=random).float()
    scores, places = nearest_of_parts(queries, iter(passages.split(sizes)), count)
    expected, at = nearest(queries, passages, count)
    assert torch.equal(scores, expected) and torch.equal(places, at)
