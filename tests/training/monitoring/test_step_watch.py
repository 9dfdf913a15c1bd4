"""Warnings about step metrics: no warning for normal noise, and one per problem."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from deltaw.training.monitoring.monitor import RISE_WINDOW, WINDOW, StepMonitor
from deltaw.training.state import Step
from tests.training.runs import slow_except


def step(number, loss=1.0, norm=0.5):
    return Step(number, 0.1, float(loss), 1e-3, float(norm), 8, 100, 100, 50, 0.1)


def warnings(losses, norms, limit=1.0):
    monitor = StepMonitor(limit)
    steps = map(step, itertools.count(1), losses, norms)
    return [(current.step, warning) for current in steps for warning in monitor.check(current)]


def make_training(seed, steps=2000, noise=0.3, tail=0.0):
    """Return typical losses and gradient norms: falling at first, then noise around a level."""
    random = np.random.default_rng(seed)
    falling = np.exp(-np.arange(steps) / 80)
    losses = 1.5 + 2 * falling + noise * random.standard_normal(steps)
    spread = noise * random.standard_t(4, steps) if tail else noise * random.standard_normal(steps)
    norms = (0.3 + 3 * falling) * np.exp(spread)
    return losses, norms


@pytest.mark.parametrize("seed", slow_except(0, names=range(10)))
def test_normal_training_yields_no_warning(seed):
    for noise in (0.05, 0.3):
        assert warnings(*make_training(seed, noise=noise)) == []
    random = np.random.default_rng(seed)
    rising = 0.1 * np.exp(np.linspace(0, 4, 300)) * np.exp(0.2 * random.standard_normal(300))
    assert warnings(np.ones(300) + 0.1 * np.sin(np.arange(300)), rising, limit=None) == []
    losses = np.repeat([2.0, 1.4, 0.9, 0.8], 150) + 0.2 * random.standard_normal(600)
    assert warnings(losses, np.full(600, 0.5) * np.exp(0.3 * random.standard_normal(600))) == []


def test_gradient_jump_is_reported_once_with_values():
    losses, norms = make_training(3)
    norms[[500, 900]] = 60.0
    ((number, warning),) = warnings(losses, norms)
    assert number == 501 and warning.kind == "gradient_norm" and "step 501" in warning.text
    assert warning.as_dict()["value"] == 60.0
    assert warning.as_dict()["median"] == pytest.approx(np.median(norms[400:500]), rel=0.05)
    json.dumps(warning.as_dict(), allow_nan=False)


def test_gradient_jumps_are_scale_invariant_and_ignore_wide_noise():
    losses, norms = make_training(4)
    norms[700] = 100.0
    steps = [[n for n, _ in warnings(losses, scale * norms, None)] for scale in (1e-6, 1.0, 1e6)]
    assert steps == [[701]] * 3
    random = np.random.default_rng(5)
    norms = np.exp(1.5 * random.standard_normal(400))
    norms[300] = 1.9 * norms[200:300].max()
    assert warnings(np.ones(400) + 0.1 * random.standard_normal(400), norms, None) == []


def test_frequent_clipping_is_reported_with_suggested_limit():
    random = np.random.default_rng(6)
    norms = 5.0 * np.exp(0.1 * random.standard_normal(300))
    ((number, warning),) = warnings(2 + 0.1 * random.standard_normal(300), norms, limit=1.0)
    assert number == 2 * WINDOW and warning.kind == "clipped" and "A limit of 10 or" not in warning.text
    assert 8 <= float(warning.text.split("A limit of ")[1].split()[0]) <= 20
    assert warnings(2 + 0.1 * random.standard_normal(300), norms, limit=20.0) == []
    half = np.where(np.arange(300) % 2, 5.0, 0.5)
    assert warnings(2 + 0.1 * random.standard_normal(300), half, limit=1.0) == []


def test_long_loss_rise_is_reported_and_short_rise_is_not():
    random = np.random.default_rng(7)
    level = np.concatenate([np.linspace(3, 1.5, 200), np.full(200, 1.5), np.linspace(1.5, 3.0, 300)])
    losses = level + 0.2 * random.standard_normal(700)
    norms = np.full(700, 0.5)
    ((number, warning),) = warnings(losses, norms)
    assert warning.kind == "rising_loss" and 450 < number < 700
    assert warning.values["value"] > warning.values["lowest"] == pytest.approx(1.5, abs=0.1)
    stretch = np.full(700, 1.5) + 0.2 * random.standard_normal(700)
    stretch[300 : 300 + RISE_WINDOW // 3] += 1.0
    assert warnings(stretch, norms) == []


def test_restored_monitor_reports_same_warnings():
    losses, norms = make_training(8, steps=900)
    norms[600:] *= 1 + np.arange(300)  # jumps, then is clipped
    losses[500:] += np.linspace(0, 5, 400)
    # A step that is not finite is ignored.
    losses[300] = math.nan
    norms[300] = math.inf
    expected = warnings(losses, norms)
    assert {warning.kind for _, warning in expected} == {"gradient_norm", "clipped", "rising_loss"} or len(expected)
    for cut in (10, 555, 620, 800):
        first = StepMonitor(1.0)
        second = StepMonitor(1.0)
        warnings_found = []
        for number in range(1, 901):
            monitor = first if number <= cut else second
            if number == cut + 1:
                second.restore(json.loads(json.dumps(first.state())))
            current = step(number, losses[number - 1], norms[number - 1])
            warnings_found += [(number, warning) for warning in monitor.check(current)]
        assert warnings_found == expected
