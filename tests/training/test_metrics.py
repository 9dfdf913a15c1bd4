"""Metrics against closed forms and slow, obvious reference implementations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.training.evaluation.base import (
    Evaluation,
    classification_metrics,
    confusion,
    matthews,
    mean_interval,
    pearson,
    ranks,
    regression_metrics,
    spearman,
    t_quantile,
    wilson_interval,
)

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(pairs)
def test_classes_agree_with_counting_row_by_row(rows):
    truth, predicted = map(list, zip(*rows, strict=True))
    found = classification_metrics(confusion(np.array(truth), np.array(predicted), 4))
    assert found["accuracy"] == pytest.approx(sum(t == p for t, p in rows) / len(rows))
    scores = []
    for c in set(truth) | set(predicted):
        hits, named, there = sum(t == p == c for t, p in rows), predicted.count(c), truth.count(c)
        precision, recall = hits / max(1, named), hits / max(1, there)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert found["macro_f1"] == pytest.approx(sum(scores) / len(scores))
    assert "f1" not in found


@given(pairs)
def test_matthews_is_the_correlation_of_indicator_vectors(rows):
    truth, predicted = (np.eye(4)[list(side)] for side in zip(*rows, strict=True))
    found = matthews(confusion(truth.argmax(1), predicted.argmax(1), 4))

    def covariance(a, b):
        return ((a - a.mean(0)) * (b - b.mean(0))).sum()

    spread = covariance(truth, truth) * covariance(predicted, predicted)
    if spread < 1e-9:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(covariance(truth, predicted) / math.sqrt(spread), abs=1e-9)


def test_two_classes_have_the_f1_of_the_second_and_the_usual_matthews():
    tn, fp, fn, tp = 50, 10, 5, 35
    found = classification_metrics(np.array([[tn, fp], [fn, tp]]))
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx((tp * tn - fp * fn) / below)


def test_constant_answers_have_no_correlation():
    found = regression_metrics(np.arange(7.0), np.full(7, 0.1))  # however it is rounded
    assert math.isnan(found["pearson"]) and math.isnan(found["spearman"]) and found["rmse"] > 0
    assert math.isnan(pearson(np.array([1.0]), np.array([2.0])))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_ranks_share_the_mean_of_the_places_of_equals(values):
    slow = [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]
    assert ranks(np.array(values)).tolist() == slow


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_correlations_agree_with_sums_over_all_pairs_of_rows(rows):
    def slow(points):
        top = left = right = 0.0
        for (a, b), (c, d) in itertools.combinations(points, 2):
            top, left, right = top + (a - c) * (b - d), left + (a - c) ** 2, right + (b - d) ** 2
        return top / math.sqrt(left * right) if left * right else math.nan

    truth, predicted = map(np.array, zip(*rows, strict=True))
    ranked = list(zip(ranks(truth), ranks(predicted), strict=True))
    assert pearson(truth, predicted) == pytest.approx(slow(rows), nan_ok=True)
    assert spearman(truth, predicted) == pytest.approx(slow(ranked), nan_ok=True)


def test_errors_keep_the_unit_of_the_numbers():
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    found = regression_metrics(truth, truth + np.array([1, -1, 1, -1]) * 3)
    assert (found["rmse"], found["mae"], found["mse"]) == (3.0, 3.0, 9.0)


def test_the_interval_of_a_mean_is_that_of_the_normal_law_for_many_rows():
    rows = np.random.default_rng(1).normal(size=2000)
    half = 1.96 * rows.std() / math.sqrt(len(rows))
    low, high = mean_interval(rows)
    assert (low, high) == pytest.approx((rows.mean() - half, rows.mean() + half), abs=0.01 * half)
    narrow = mean_interval(rows, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_few_rows_of_a_loss_leave_room_for_doubt():
    losses = np.array([1.0, 2.0, 3.0])
    low, high = mean_interval(losses)
    assert high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4) and low == 0.0  # a loss is not negative
    assert mean_interval(losses - 3)[0] < -3.0
    assert mean_interval(losses[:1]) is None


# By statsmodels.stats.proportion.proportion_confint(hits, rows, method="wilson").
WILSON = {(0, 3): (0.0, 0.561497), (3, 3): (0.438503, 1.0), (9, 12): (0.467695, 0.911060), (1, 1): (0.206549, 1.0)}


@pytest.mark.parametrize(("hits", "rows"), WILSON)
def test_a_share_has_wilsons_interval(hits, rows):
    found = mean_interval(np.repeat([1.0, 0.0], [hits, rows - hits]), share=True)
    assert found == pytest.approx(WILSON[hits, rows], abs=2e-3)  # t of 1000 degrees of freedom
    evaluation = Evaluation.of_rows({"accuracy": hits / rows}, "accuracy", np.repeat([1.0, 0.0], [hits, rows - hits]))
    assert evaluation.interval == found == tuple(evaluation.score()["interval"])


@pytest.mark.parametrize("count", [3, 12, 40])
def test_wilsons_interval_holds_about_as_often_as_it_says(count):
    """Over all true shares: at one share alone, no interval of whole counts holds exactly 95 times of 100."""
    hits, share = np.arange(count + 1), np.linspace(0, 1, 101)[:, None]
    odds = np.array([math.comb(count, hit) for hit in hits]) * share**hits * (1 - share) ** (count - hits)
    low, high = np.array([wilson_interval(hit / count, count) for hit in hits]).T
    assert 0.94 < (odds * ((low <= share) & (share <= high))).sum(1).mean() < 0.98


def test_every_named_set_keeps_its_interval():
    one = Evaluation.of_rows({"accuracy": 1.0}, "accuracy", np.ones(3))
    both = replace(one, name="a", others={"b": replace(one, intervals={"written_exact_match": (0.1, 0.2)})})
    assert both.named_intervals() == {
        "a accuracy": one.interval,
        "b accuracy": one.interval,
        "b written_exact_match": (0.1, 0.2),
    }


@pytest.mark.parametrize(
    ("freedom", "bound"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (100, 1.98397)]
)
def test_bounds_of_t_are_those_of_the_tables(freedom, bound):
    assert t_quantile(0.95, freedom) == pytest.approx(bound, rel=1e-4)


def test_between_whole_degrees_of_freedom_the_bound_lies_between():
    assert t_quantile(0.95, 2) > t_quantile(0.95, 2.4) > t_quantile(0.95, 3)
    assert t_quantile(0.95, 1e9) == pytest.approx(1.962, abs=2e-3)
