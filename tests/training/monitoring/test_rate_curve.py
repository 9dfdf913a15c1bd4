"""What is read off the curve of a range test, on curves whose answer is known."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from deltaw.training.callbacks import RateSearch
from deltaw.training.monitoring.rates import read_curve, smooth

RATES = np.geomspace(1e-5, 1e-1, 41).tolist()


def valley(at, noise=0.0, seed=0, depth=1.0):
    """Flat at low rates, lowest at ``at``, steep beyond."""
    logs = np.log10(np.asarray(RATES)) - np.log10(at)
    losses = 2.0 - depth * np.exp(-(logs**2)) + np.where(logs > 0, 3 * logs**2, 0)
    return (losses + noise * np.random.default_rng(seed).standard_normal(len(RATES))).tolist()


def test_the_rate_is_a_fifth_of_the_highest_with_a_low_loss():
    for at, seed in itertools.product([1e-4, 1e-3, 1e-2], range(5)):
        found = read_curve(RATES, valley(at, 0.05, seed), usual=5e-4, diverged=False)
        assert at / 5 / 2 < found.chosen < at / 5 * 2
        assert found.lowest == pytest.approx(at, rel=0.8) and found.steepest < found.lowest
        assert "range test" in found.why and "5e-04" in found.why.replace("0.0005", "5e-04")


def test_curves_of_noise_alone_or_that_say_nothing_give_the_usual_rate():
    for seed in range(20):
        losses = (2 + 0.1 * np.random.default_rng(seed).standard_normal(len(RATES))).tolist()
        found = read_curve(RATES, losses, usual=5e-4, diverged=False)
        assert found.chosen == 5e-4 and found.lowest is None and "noise" in found.why
    for losses in ([], [1.0], [3.0, 2.0, 1.0], np.linspace(1, 3, 41).tolist()):
        assert read_curve(RATES[: len(losses)], losses, usual=1e-3, diverged=True).chosen == 1e-3


def test_on_a_level_curve_the_end_of_the_level_counts_not_its_lowest_point():
    logs = np.log10(np.asarray(RATES))
    level = 3.0 - 2.5 * np.clip(logs + 4.5, 0, 1) + 4 * np.clip(logs + 2.0, 0, None)
    for seed in range(5):
        losses = level + 0.05 * np.random.default_rng(seed).standard_normal(len(RATES))
        assert 1e-2 / 5 / 1.6 < read_curve(RATES, losses.tolist(), usual=5e-4, diverged=True).chosen < 1e-2 / 5 * 1.6


def test_a_loss_that_falls_to_the_last_rate_says_so():
    losses = np.linspace(3, 1, 41).tolist()
    assert "the highest rate tried" in read_curve(RATES, losses, usual=1e-3, diverged=False).why
    assert "the highest rate tried" not in read_curve(RATES, losses, usual=1e-3, diverged=True).why


def test_smoothing_keeps_a_line_and_takes_noise_away():
    line = np.linspace(5, 1, 30)
    np.testing.assert_allclose(smooth(line), line, atol=1e-9)
    flat = np.random.default_rng(0).standard_normal(300)
    assert np.std(smooth(flat)) < 0.5 * np.std(flat)
    assert smooth([]) == [] and smooth([2.0]) == [2.0]


def test_it_survives_json():
    found = read_curve(RATES, valley(1e-3), usual=5e-4, diverged=True)
    assert RateSearch(**json.loads(json.dumps(found.as_dict(), allow_nan=False))) == found
