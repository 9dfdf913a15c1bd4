"""When a validation loss counts as flat."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deltaw.experiments.until_flat import FEWEST, has_flattened, steps_between


def flat_at(losses, untrained=4.0) -> int | None:
    """After how many evaluations a training with these losses would end."""
    return next((n for n in range(1, len(losses) + 1) if has_flattened(losses[:n], untrained)), None)


def test_a_descent_that_goes_on_is_not_flat():
    assert flat_at([1.0 * 0.95**n for n in range(60)]) is None
    assert flat_at([2.0 / (n + 1) for n in range(60)]) is None


def test_a_curve_is_flat_once_its_second_half_brought_nothing():
    falling = [1.0 - 0.05 * n for n in range(10)]
    assert flat_at(falling + [falling[-1]] * 20) == 20


def test_a_loss_that_rises_again_is_flat():
    valley = [0.5 + 0.02 * (n - 6) ** 2 for n in range(30)]
    ended = flat_at(valley)
    assert ended is not None and 10 <= ended <= 14


def test_a_long_wait_before_the_fall_is_waited_for_longer_than_the_wait_took():
    late = [2.0, 1.0, 0.8, 0.75, 0.72, 0.70] + [0.699] * 4 + [0.6, 0.5, 0.45]
    assert not any(has_flattened(late[:n], 4.0) for n in range(1, 11))


def test_what_has_not_begun_to_learn_is_not_flat():
    plateau = [0.69, 0.68, 0.69, 0.67] * 10
    assert flat_at(plateau, untrained=0.7) is None
    assert flat_at([*plateau, 0.5, 0.4, *[0.39] * 60], untrained=0.7) is not None
    assert flat_at(plateau, untrained=2.0) == FEWEST


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_hide_that_nothing_is_learned_any_more(seed):
    noise = np.random.default_rng(seed).normal(0, 0.004, 200)
    losses = [0.5 + math.exp(-n / 4) + noise[n] for n in range(200)]
    ended = flat_at(losses)
    assert ended is not None and 16 <= ended <= 80


def test_few_evaluations_tell_nothing():
    assert not has_flattened([0.5] * (FEWEST - 1), 4.0) and has_flattened([0.5] * FEWEST, 4.0)


def test_a_loss_that_approaches_zero_is_flat_in_the_end():
    assert 18 <= flat_at([0.5**n for n in range(100)], 1.0) <= 24
    assert has_flattened([0.1, *[0.0] * 20], 1.0)


def test_evaluations_are_a_quarter_of_an_epoch_or_a_tenth_of_the_budget_apart():
    assert steps_between(100, None) == 25
    assert steps_between(100, 1000) == 25
    assert steps_between(100, 100) == 10
    assert steps_between(2, 4) == 1
