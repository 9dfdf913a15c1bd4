"""Evaluation of range-test curves with a known answer."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from deltaw.training.callbacks import RateSearch
from deltaw.training.monitoring.rates import read_curve, smooth

RATES = np.geomspace(1e-5, 1e-1, 41).tolist()


def valley(minimum, noise=0.0, seed=0, depth=1.0):
    """Return losses that are flat at low rates, lowest at ``minimum``, and steep beyond."""
    logs = np.log10(np.asarray(RATES)) - np.log10(minimum)
    losses = 2.0 - depth * np.exp(-(logs**2)) + np.where(logs > 0, 3 * logs**2, 0)
    return (losses + noise * np.random.default_rng(seed).standard_normal(len(RATES))).tolist()


def test_rate_is_fifth_of_rate_with_lowest_loss():
    for minimum, seed in itertools.product([1e-4, 1e-3, 1e-2], range(5)):
        search = read_curve(RATES, valley(minimum, 0.05, seed), usual=5e-4, diverged=False)
        assert minimum / 5 / 2 < search.chosen < minimum / 5 * 2
        assert search.lowest == pytest.approx(minimum, rel=0.8) and search.steepest < search.lowest
        assert "range test" in search.why and "5e-04" in search.why.replace("0.0005", "5e-04")


def test_uninformative_curves_yield_default_rate():
    for seed in range(20):
        losses = (2 + 0.1 * np.random.default_rng(seed).standard_normal(len(RATES))).tolist()
        search = read_curve(RATES, losses, usual=5e-4, diverged=False)
        assert search.chosen == 5e-4 and search.lowest is None and "noise" in search.why
    for losses in ([], [1.0], [3.0, 2.0, 1.0], np.linspace(1, 3, 41).tolist()):
        assert read_curve(RATES[: len(losses)], losses, usual=1e-3, diverged=True).chosen == 1e-3


def test_flat_curve_uses_end_of_plateau():
    logs = np.log10(np.asarray(RATES))
    plateau = 3.0 - 2.5 * np.clip(logs + 4.5, 0, 1) + 4 * np.clip(logs + 2.0, 0, None)
    for seed in range(5):
        losses = plateau + 0.05 * np.random.default_rng(seed).standard_normal(len(RATES))
        assert 1e-2 / 5 / 1.6 < read_curve(RATES, losses.tolist(), usual=5e-4, diverged=True).chosen < 1e-2 / 5 * 1.6


def test_loss_falling_until_last_rate_is_reported():
    losses = np.linspace(3, 1, 41).tolist()
    assert "the highest rate tried" in read_curve(RATES, losses, usual=1e-3, diverged=False).why
    assert "the highest rate tried" not in read_curve(RATES, losses, usual=1e-3, diverged=True).why


def test_smoothing_preserves_line_and_reduces_noise():
    line = np.linspace(5, 1, 30)
    np.testing.assert_allclose(smooth(line), line, atol=1e-9)
    flat = np.random.default_rng(0).standard_normal(300)
    assert np.std(smooth(flat)) < 0.5 * np.std(flat) and smooth([]) == [] and smooth([2.0]) == [2.0]


def test_rate_search_survives_json():
    search = read_curve(RATES, valley(1e-3), usual=5e-4, diverged=True)
    assert RateSearch(**json.loads(json.dumps(search.as_dict(), allow_nan=False))) == search
