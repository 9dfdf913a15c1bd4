"""When a validation loss counts as flat."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaw.experiments.until_flat import FEWEST, has_flattened, steps_between


def flat_at(losses, untrained=4.0) -> int | None:
    """After how many evaluations a training with these losses would end."""
    return next((n for n in range(1, len(losses) + 1) if has_flattened(losses[:n], untrained)), None)


FALLING = [1.0 - 0.05 * n for n in range(10)]
LATE = [2.0, 1.0, 0.8, 0.75, 0.72, 0.70] + [0.699] * 4 + [0.6, 0.5, 0.45]
UNLEARNED = [0.69, 0.68, 0.69, 0.67] * 10


@pytest.mark.parametrize(
    ("losses", "untrained", "earliest", "latest"),
    [
        ([0.95**n for n in range(60)], 4.0, None, None),
        ([2.0 / (n + 1) for n in range(60)], 4.0, None, None),
        (FALLING + [FALLING[-1]] * 20, 4.0, 20, 20),
        ([0.5 + 0.02 * (n - 6) ** 2 for n in range(30)], 4.0, 10, 14),  # it rises again
        (LATE[:10], 4.0, None, None),  # a wait is waited for longer than it took
        (UNLEARNED, 0.7, None, None),
        ([*UNLEARNED, 0.5, 0.4, *[0.39] * 60], 0.7, 41, 102),
        (UNLEARNED, 2.0, FEWEST, FEWEST),
        ([0.5] * FEWEST, 4.0, FEWEST, FEWEST),
        ([0.5**n for n in range(100)], 1.0, 18, 24),  # towards zero
        ([0.1, *[0.0] * 20], 1.0, FEWEST, 21),
    ],
)
def test_a_loss_is_flat_once_the_second_half_brought_nothing_and_not_before(losses, untrained, earliest, latest):
    ended = flat_at(losses, untrained)
    assert ended is None if earliest is None else earliest <= ended <= latest


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_hide_that_nothing_is_learned_any_more(seed):
    noise = np.random.default_rng(seed).normal(0, 0.004, 200)
    losses = [0.5 + math.exp(-n / 4) + noise[n] for n in range(200)]
    ended = flat_at(losses)
    assert ended is not None and 16 <= ended <= 80


def test_evaluations_are_a_quarter_of_an_epoch_or_a_tenth_of_the_budget_apart():
    assert steps_between(100, None) == 25
    assert steps_between(100, 1000) == 25
    assert steps_between(100, 100) == 10
    assert steps_between(2, 4) == 1
