"""Metrics against closed forms and slow, obvious reference implementations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaw.training.evaluation.base import (
    bootstrap_interval,
    classification_metrics,
    confusion,
    matthews,
    pearson,
    ranks,
    regression_metrics,
    spearman,
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
    low, high = bootstrap_interval(rows, seed=5)
    half = 1.96 * rows.std() / math.sqrt(len(rows))
    assert low == pytest.approx(rows.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(rows.mean() + half, abs=0.15 * half)
    assert bootstrap_interval(rows, seed=5) == (low, high)
    narrow = bootstrap_interval(rows, seed=5, level=0.5)
    assert low < narrow[0] < narrow[1] < high
