"""Learning-rate schedules compared with closed forms, and the optimizer with AdamW in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltaw.training.optimizer import SCHEDULES, RisingRates, Schedule, adamw, learning_rate_factor, warmup_steps


def test_warmup_is_a_share_below_one_and_steps_otherwise():
    for *arguments, steps in [(0.0, 10, 0), (0.03, 100, 3), (0.03, 10, 1), (0.5, 7, 4), (1, 10, 1), (5.0, 9, 5)]:
        assert warmup_steps(*arguments) == steps


def test_learning_rate_matches_closed_form():
    cosine_drop = math.sqrt(0.5) / 2
    for name, warmup, expected in [
        ("linear", 2, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", 0, [1, 0.5 + cosine_drop, 0.5, 0.5 - cosine_drop]),
        ("constant", 1, [0.5, 1, 1, 1]),
    ]:
        total = len(expected)
        assert [learning_rate_factor(s, total, warmup, name) for s in range(total)] == pytest.approx(expected)


@given(total=st.integers(1, 200), warmup=st.integers(0, 250), schedule=st.sampled_from(SCHEDULES))
def test_rate_is_positive_rises_in_warmup_then_never_rises(total, warmup, schedule):
    rates = [learning_rate_factor(step, total, warmup, schedule) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    rising = rates[:warmup]
    after = rates[warmup:]
    assert rising == sorted(rising) and after == sorted(after, reverse=True)
    assert not after or after[0] == 1


def test_two_steps_match_reference_adamw():
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    expected = parameter.detach().double()
    rate = 0.1
    decay = 0.2
    first = 0.8
    second = 0.95
    epsilon = 1e-8
    optimizer = adamw([parameter], rate, weight_decay=decay, betas=(first, second))
    mean = 0.0
    square = 0.0
    for step in (1, 2):
        parameter.grad = gradient = torch.randn(3, 2)
        optimizer.step()
        mean = first * mean + (1 - first) * gradient.double()
        square = second * square + (1 - second) * gradient.double() ** 2
        corrected = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + epsilon)
        expected = expected * (1 - rate * decay) - rate * corrected
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_replanned_schedule_continues_from_current_rate(name):
    first = Schedule(name, 2.0, 100, 0.1)
    last = pytest.approx(2.0 if name == "constant" else 0.0, abs=1e-9)
    for step, total in [(40, 60), (40, 400), (10, 30), (99, 120)]:
        second = first.replanned(step, total)
        assert second.rate(step) == pytest.approx(first.rate(step))
        later = [second.rate(s) for s in range(step, total)]
        assert later == sorted(later, reverse=True) and second.rate(total) == last
        third = second.replanned(step + 5, total + 50)
        assert third.rate(step + 5) == pytest.approx(second.rate(step + 5)) and third.rate(total + 50) == last


def test_warmup_share_refers_to_the_first_plan():
    planned = Schedule("linear", 1.0, 100_000, 0.03).replanned(8, 200)
    assert planned.rate(7) < 1.0 == planned.rate(8) and planned.rate(200) == 0.0
    assert Schedule("linear", 1.0, 100_000, 0.03).replanned(2, 200).rate(5) == pytest.approx(6 / 7)


def test_rising_rates_grow_geometrically():
    rates = [RisingRates("constant", 1e-1, 5, lowest=1e-5).rate(step) for step in range(5)]
    assert rates == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
