"""How much of the differences between trials a setting accounts for."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.experiments.tune import weight

RATES = [10.0**e for e in np.linspace(-5, -1, 15)]


def test_a_setting_that_decides_alone_accounts_for_all():
    assert weight(RATES, [rate**2 for rate in RATES]) == pytest.approx(1.0, abs=0.02)
    valley = [(np.log10(rate) + 3) ** 2 for rate in RATES]
    assert weight(RATES, valley) > 0.9
    names = ["linear", "cosine", "constant"] * 5
    assert weight(names, [names.index(name) for name in names]) == pytest.approx(1.0)


def test_a_setting_without_effect_accounts_for_little():
    rng = np.random.default_rng(0)
    drawn = [weight(RATES, rng.normal(size=15).tolist()) for _ in range(200)]
    assert np.mean(drawn) < 0.1


def test_one_trial_that_went_wrong_does_not_decide():
    losses = [rate**2 for rate in RATES]
    losses[7] = float("inf")
    assert weight(RATES, losses) > 0.5


def test_what_cannot_be_told_is_none():
    assert weight([1, 2, 3], [1.0, 2.0, 3.0]) is None
    assert weight([4] * 9, list(range(9))) is None
    assert weight(RATES, [1.0] * 15) is None
