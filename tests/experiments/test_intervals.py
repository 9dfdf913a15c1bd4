"""Confidence intervals over seeds and rows: coverage and width."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.experiments.intervals import difference_interval, mean_squares, random_effects_interval


def width(interval):
    return interval[1] - interval[0]


def test_mean_squares_sum_to_total_variation():
    scores = np.random.default_rng(0).normal(size=(4, 30))
    of_seeds, of_rows, of_rest = mean_squares(scores)
    total = ((scores - scores.mean()) ** 2).sum()
    assert 3 * of_seeds + 29 * of_rows + 3 * 29 * of_rest == pytest.approx(total)


def test_differing_seeds_widen_interval():
    rows = (np.random.default_rng(0).random(400) < 0.7).astype(float)
    equal_seeds = np.stack([rows, rows, rows])
    different_seeds = equal_seeds + np.array([[-0.1], [0.0], [0.1]])
    single_width = width(random_effects_interval(rows[None]))
    assert width(random_effects_interval(equal_seeds)) == pytest.approx(single_width, rel=0.1)
    assert width(random_effects_interval(different_seeds)) > 3 * single_width
    assert np.mean(random_effects_interval(different_seeds)) == pytest.approx(rows.mean())


def test_more_rows_do_not_reduce_variance_of_seeds():
    offsets = np.array([[-0.1], [0.0], [0.1]])
    small_sample, large_sample = (random_effects_interval(np.zeros((3, rows)) + offsets) for rows in (10, 10_000))
    assert width(small_sample) == pytest.approx(width(large_sample))
    assert width(large_sample) == pytest.approx(2 * 4.30265 * 0.1 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize(("of_seeds", "of_rows"), [(0.0, 0.4), (0.02, 0.4), (0.2, 0.1)])
def test_interval_coverage_matches_confidence_level(of_seeds, of_rows):
    """About 95 % of the intervals of repeated experiments with new seeds and rows contain the true mean."""
    rng = np.random.default_rng(3)
    num_covered = 0
    for _ in range(200):
        seeds = rng.normal(0, of_seeds, (3, 1)) if of_seeds else np.zeros((3, 1))
        scores = 0.7 + seeds + rng.normal(0, of_rows, (1, 60)) + rng.normal(0, 0.2, (3, 60))
        low, high = random_effects_interval(scores)
        num_covered += low <= 0.7 <= high
    assert num_covered / 200 > 0.91


def test_equal_scores_have_zero_width():
    assert random_effects_interval(np.ones((3, 5))) == (1.0, 1.0)
    assert random_effects_interval(np.ones((1, 5))) == (1.0, 1.0)
    low, high = random_effects_interval(np.array([[0.1], [0.2], [0.3]]))
    assert low < 0.2 < high
    assert random_effects_interval(np.ones((1, 1))) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_perfect_share_of_few_rows_is_uncertain(seeds):
    low, high = random_effects_interval(np.ones((seeds, 5)), share=True)
    assert low == pytest.approx(0.566, abs=2e-3) and high == 1.0, "seeds that agree are not further rows"
    small_sample, large_sample = (width(difference_interval(np.zeros((seeds, r)), share=True)) for r in (10, 1000))
    assert small_sample > 0.3 and large_sample < 0.01
    low, high = difference_interval(np.ones((seeds, 10)), share=True)
    assert 0.3 < low < 0.7 and high == 1.0


def test_interval_of_share_over_seeds_equals_variance_interval():
    rng = np.random.default_rng(0)
    scores = (rng.random((3, 2000)) < 0.7).astype(float)
    assert random_effects_interval(scores, share=True) == pytest.approx(random_effects_interval(scores), abs=2e-3)
    different_seeds = (rng.random((3, 2000)) < np.array([[0.5], [0.7], [0.9]])).astype(float)
    assert width(random_effects_interval(different_seeds, share=True)) > 0.4
