"""Chart helpers: smoothing, log scales and ticks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.reports.svg import linear_ticks, log_ticks, needs_log_scale, running_mean


def test_running_mean_keeps_constants_and_follows_steps():
    assert running_mean(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    step = running_mean(np.r_[np.zeros(500), np.ones(500)])
    assert step[499] == 0 and 0.9 < step[-1] <= 1 and np.all(np.diff(step) >= -1e-12)
    assert running_mean(np.array([5.0, 1.0]))[0] == 5.0


def test_wide_positive_values_use_log_scale():
    assert needs_log_scale([0.01, 1.0]) and not needs_log_scale([0.5, 2.0])
    assert not needs_log_scale([0.0, 100.0]) and not needs_log_scale([])


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_linear_ticks_are_limited_and_within_range(low, span):
    ticks = linear_ticks(low, low + span)
    assert len(ticks) <= 6
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    assert all(tick == round(tick) for tick in linear_ticks(low, low + span, integers=True) if span > 1)


@given(st.floats(-8, 6), st.floats(0.1, 9))
@settings(max_examples=200, deadline=None)
def test_log_ticks_are_limited_and_within_range(power, span):
    low = 10.0**power
    high = 10.0 ** (power + span)
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 5
    assert all(low * 0.999 <= tick <= high * 1.01 for tick in ticks)
