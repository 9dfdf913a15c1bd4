"""Metrics compared with closed forms and slow reference implementations."""

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
    confusion_matrix,
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
def test_classification_metrics_match_counts_by_row(rows):
    truth, predicted = map(list, zip(*rows, strict=True))
    metrics = classification_metrics(confusion_matrix(np.array(truth), np.array(predicted), 4))
    assert metrics["accuracy"] == pytest.approx(sum(t == p for t, p in rows) / len(rows))
    scores = []
    for c in set(truth) | set(predicted):
        hits = sum(t == p == c for t, p in rows)
        num_predicted = predicted.count(c)
        num_true = truth.count(c)
        precision = hits / max(1, num_predicted)
        recall = hits / max(1, num_true)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert metrics["macro_f1"] == pytest.approx(sum(scores) / len(scores)) and "f1" not in metrics


@given(pairs)
def test_matthews_equals_correlation_of_indicators(rows):
    truth, predicted = (np.eye(4)[list(side)] for side in zip(*rows, strict=True))
    actual = matthews(confusion_matrix(truth.argmax(1), predicted.argmax(1), 4))

    def covariance(a, b):
        return ((a - a.mean(0)) * (b - b.mean(0))).sum()

    spread = covariance(truth, truth) * covariance(predicted, predicted)
    if spread < 1e-9:
        assert math.isnan(actual)
    else:
        assert actual == pytest.approx(covariance(truth, predicted) / math.sqrt(spread), abs=1e-9)


def test_binary_f1_and_matthews_match_closed_forms():
    tn = 50
    fp = 10
    fn = 5
    tp = 35
    metrics = classification_metrics(np.array([[tn, fp], [fn, tp]]))
    assert metrics["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics["matthews"] == pytest.approx((tp * tn - fp * fn) / denominator)


def test_correlation_of_constant_predictions_is_nan():
    metrics = regression_metrics(np.arange(7.0), np.full(7, 0.1))  # 0.1 is not exact in binary
    assert math.isnan(metrics["pearson"]) and math.isnan(metrics["spearman"]) and metrics["rmse"] > 0
    assert math.isnan(pearson(np.array([1.0]), np.array([2.0])))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_tied_values_share_their_mean_rank(values):
    slow = [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]
    assert ranks(np.array(values)).tolist() == slow


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30))
def test_correlations_match_sums_over_row_pairs(rows):
    def slow(points):
        top = left = right = 0.0
        for (a, b), (c, d) in itertools.combinations(points, 2):
            top += (a - c) * (b - d)
            left += (a - c) ** 2
            right += (b - d) ** 2
        return top / math.sqrt(left * right) if left * right else math.nan

    truth, predicted = map(np.array, zip(*rows, strict=True))
    ranked = list(zip(ranks(truth), ranks(predicted), strict=True))
    assert pearson(truth, predicted) == pytest.approx(slow(rows), nan_ok=True)
    assert spearman(truth, predicted) == pytest.approx(slow(ranked), nan_ok=True)


def test_regression_errors_have_the_unit_of_labels():
    truth = np.array([1.0, 2.0, 3.0, 4.0])
    metrics = regression_metrics(truth, truth + np.array([1, -1, 1, -1]) * 3)
    assert (metrics["rmse"], metrics["mae"], metrics["mse"]) == (3.0, 3.0, 9.0)


def test_mean_interval_approaches_the_normal_interval():
    rows = np.random.default_rng(1).normal(size=2000)
    half = 1.96 * rows.std() / math.sqrt(len(rows))
    low, high = mean_interval(rows)
    assert (low, high) == pytest.approx((rows.mean() - half, rows.mean() + half), abs=0.01 * half)
    narrow = mean_interval(rows, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_mean_interval_of_few_rows_is_wide():
    losses = np.array([1.0, 2.0, 3.0])
    low, high = mean_interval(losses)
    assert high - 2.0 == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4) and low == 0.0  # a loss is not negative
    assert mean_interval(losses - 3)[0] < -3.0 and mean_interval(losses[:1]) is None


# From statsmodels.stats.proportion.proportion_confint(hits, rows, method="wilson").
WILSON = {(0, 3): (0.0, 0.561497), (3, 3): (0.438503, 1.0), (9, 12): (0.467695, 0.911060), (1, 1): (0.206549, 1.0)}


@pytest.mark.parametrize(("hits", "rows"), WILSON)
def test_share_uses_wilson_interval(hits, rows):
    interval = mean_interval(np.repeat([1.0, 0.0], [hits, rows - hits]), share=True)
    assert interval == pytest.approx(WILSON[hits, rows], abs=2e-3)  # t of 1000 degrees of freedom
    evaluation = Evaluation.of_rows({"accuracy": hits / rows}, "accuracy", np.repeat([1.0, 0.0], [hits, rows - hits]))
    assert evaluation.interval == interval == tuple(evaluation.score()["interval"])


@pytest.mark.parametrize("count", [3, 12, 40])
def test_wilson_interval_has_nominal_coverage(count):
    """Averages over all true shares, because integer counts have no interval of exactly 95 % at a single share."""
    hits = np.arange(count + 1)
    share = np.linspace(0, 1, 101)[:, None]
    probabilities = np.array([math.comb(count, hit) for hit in hits]) * share**hits * (1 - share) ** (count - hits)
    low, high = np.array([wilson_interval(hit / count, count) for hit in hits]).T
    assert 0.94 < (probabilities * ((low <= share) & (share <= high))).sum(1).mean() < 0.98


def test_named_sets_have_intervals():
    evaluation = Evaluation.of_rows({"accuracy": 1.0}, "accuracy", np.ones(3))
    other = replace(evaluation, intervals={"generated_exact_match": (0.1, 0.2)})
    intervals = replace(evaluation, name="a", other_sets={"b": other}).named_intervals()
    assert intervals.pop("b generated_exact_match") == (0.1, 0.2)
    assert intervals == dict.fromkeys(("a accuracy", "b accuracy"), evaluation.interval)


def test_t_quantiles_match_tables_and_interpolate_fractional_degrees_of_freedom():
    for freedom, bound in {1: 12.7062, 2: 4.30265, 3: 3.18245, 10: 2.22814, 100: 1.98397}.items():
        assert t_quantile(0.95, freedom) == pytest.approx(bound, rel=1e-4)
    assert t_quantile(0.95, 2) > t_quantile(0.95, 2.4) > t_quantile(0.95, 3)
    assert t_quantile(0.95, 1e9) == pytest.approx(1.962, abs=2e-3)
