"""Importance of settings for differences between trials."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.experiments.tune import setting_importance

RATES = [10.0**e for e in np.linspace(-5, -1, 15)]


def test_decisive_setting_has_importance_one():
    assert setting_importance(RATES, [rate**2 for rate in RATES]) == pytest.approx(1.0, abs=0.02)
    valley = [(np.log10(rate) + 3) ** 2 for rate in RATES]
    assert setting_importance(RATES, valley) > 0.9
    names = ["linear", "cosine", "constant"] * 5
    assert setting_importance(names, [names.index(name) for name in names]) == pytest.approx(1.0)


def test_irrelevant_setting_has_low_importance():
    rng = np.random.default_rng(0)
    importances = [setting_importance(RATES, rng.normal(size=15).tolist()) for _ in range(200)]
    assert np.mean(importances) < 0.1


def test_failed_trial_does_not_determine_importance():
    losses = [rate**2 for rate in RATES]
    losses[7] = float("inf")
    assert setting_importance(RATES, losses) > 0.5


def test_importance_requires_enough_variation():
    assert setting_importance([1, 2, 3], [1.0, 2.0, 3.0]) is None
    assert setting_importance([4] * 9, list(range(9))) is None
    assert setting_importance(RATES, [1.0] * 15) is None
