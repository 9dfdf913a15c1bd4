"""Detection of a flat validation loss."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaw.experiments.flattening import MIN_EVALUATIONS, has_flattened
from deltaw.experiments.until_flat import steps_between


def evaluations_until_flat(losses, untrained=4.0) -> int | None:
    """Return the number of evaluations after which training with these losses would stop."""
    return next((n for n in range(1, len(losses) + 1) if has_flattened(losses[:n], untrained)), None)


FALLING = [1.0 - 0.05 * n for n in range(10)]
LATE = [2.0, 1.0, 0.8, 0.75, 0.72, 0.70] + [0.699] * 4 + [0.6, 0.5, 0.45]
UNLEARNED = [0.69, 0.68, 0.69, 0.67] * 10


LOSS_CURVES = [
    ([0.95**n for n in range(60)], 4.0, None, None),
    ([2.0 / (n + 1) for n in range(60)], 4.0, None, None),
    (FALLING + [FALLING[-1]] * 20, 4.0, 20, 20),
    ([0.5 + 0.02 * (n - 6) ** 2 for n in range(30)], 4.0, 10, 14),  # rises again
    (LATE[:10], 4.0, None, None),  # the plateau is not yet long enough
    (UNLEARNED, 0.7, None, None),
    ([*UNLEARNED, 0.5, 0.4, *[0.39] * 60], 0.7, 41, 102),
    (UNLEARNED, 2.0, MIN_EVALUATIONS, MIN_EVALUATIONS),
    ([0.5] * MIN_EVALUATIONS, 4.0, MIN_EVALUATIONS, MIN_EVALUATIONS),
    ([0.5**n for n in range(100)], 1.0, 18, 24),  # converges to zero
    ([0.1, *[0.0] * 20], 1.0, MIN_EVALUATIONS, 21),
]


@pytest.mark.parametrize(("losses", "untrained", "earliest", "latest"), LOSS_CURVES)
def test_loss_is_flat_if_second_half_has_no_improvement(losses, untrained, earliest, latest):
    count = evaluations_until_flat(losses, untrained)
    assert count is None if earliest is None else earliest <= count <= latest


@pytest.mark.parametrize("seed", range(5))
def test_plateau_is_detected_despite_noise(seed):
    noise = np.random.default_rng(seed).normal(0, 0.004, 200)
    losses = [0.5 + math.exp(-n / 4) + noise[n] for n in range(200)]
    count = evaluations_until_flat(losses)
    assert count is not None and 16 <= count <= 80


def test_evaluation_interval_is_quarter_epoch_or_tenth_of_budget():
    assert steps_between(100, None) == 25
    assert steps_between(100, 1000) == 25
    assert steps_between(100, 100) == 10
    assert steps_between(2, 4) == 1
