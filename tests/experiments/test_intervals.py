"""Intervals over seeds and rows together: how often they hold, and what widens them."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.experiments.comparison import difference_interval, interval_of, mean_squares


def width(interval):
    return interval[1] - interval[0]


def test_the_mean_squares_add_up_to_the_whole_variation():
    scores = np.random.default_rng(0).normal(size=(4, 30))
    of_seeds, of_rows, of_rest = mean_squares(scores)
    whole = ((scores - scores.mean()) ** 2).sum()
    assert 3 * of_seeds + 29 * of_rows + 3 * 29 * of_rest == pytest.approx(whole)


def test_seeds_that_differ_widen_the_interval():
    rows = (np.random.default_rng(0).random(400) < 0.7).astype(float)
    alike = np.stack([rows, rows, rows])
    apart = alike + np.array([[-0.1], [0.0], [0.1]])
    one = width(interval_of(rows[None]))
    assert width(interval_of(alike)) == pytest.approx(one, rel=0.1), "the same model again tells nothing new"
    assert width(interval_of(apart)) > 3 * one
    assert np.mean(interval_of(apart)) == pytest.approx(rows.mean())


def test_more_rows_do_not_narrow_what_seeds_decide():
    offsets = np.array([[-0.1], [0.0], [0.1]])
    few, many = (interval_of(np.zeros((3, rows)) + offsets) for rows in (10, 10_000))
    assert width(few) == pytest.approx(width(many)) == pytest.approx(2 * 4.30265 * 0.1 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize(("of_seeds", "of_rows"), [(0.0, 0.4), (0.02, 0.4), (0.2, 0.1)])
def test_the_interval_holds_as_often_as_it_says(of_seeds, of_rows):
    """Drawn again and again with new seeds and rows, about 95 % of the intervals hold the true mean."""
    drawn = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        seeds = drawn.normal(0, of_seeds, (3, 1)) if of_seeds else np.zeros((3, 1))
        scores = 0.7 + seeds + drawn.normal(0, of_rows, (1, 60)) + drawn.normal(0, 0.2, (3, 60))
        low, high = interval_of(scores)
        held += low <= 0.7 <= high
    assert held / 200 > 0.91


def test_scores_that_are_all_equal_leave_no_doubt():
    assert interval_of(np.ones((3, 5))) == (1.0, 1.0)
    assert interval_of(np.ones((1, 5))) == (1.0, 1.0)
    low, high = interval_of(np.array([[0.1], [0.2], [0.3]]))
    assert low < 0.2 < high
    assert interval_of(np.ones((1, 1))) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_few_rows_that_are_all_right_leave_doubt_about_a_share(seeds):
    low, high = interval_of(np.ones((seeds, 5)), share=True)
    assert low == pytest.approx(0.566, abs=2e-3) and high == 1.0, "seeds that agree are not further rows"
    few, many = (width(difference_interval(np.zeros((seeds, rows)), share=True)) for rows in (10, 1000))
    assert few > 0.3 and many < 0.01
    low, high = difference_interval(np.ones((seeds, 10)), share=True)
    assert 0.3 < low < 0.7 and high == 1.0


def test_a_share_over_seeds_has_the_interval_of_its_variance():
    drawn = np.random.default_rng(0)
    scores = (drawn.random((3, 2000)) < 0.7).astype(float)
    assert interval_of(scores, share=True) == pytest.approx(interval_of(scores), abs=2e-3)
    apart = (drawn.random((3, 2000)) < np.array([[0.5], [0.7], [0.9]])).astype(float)
    assert width(interval_of(apart, share=True)) > 0.4
