"""A time budget against a clock that the tests turn: how many steps are planned, and the end in time."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from deltaw.errors import UserError
from deltaw.settings import RunConfig, duration_seconds
from deltaw.training.monitoring.best import MARGIN, Ending, TimeBudget
from deltaw.training.optimizer import Schedule


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class State:
    """A training's state as far as a budget sees it, with a real schedule."""

    def __init__(self, total, schedule="linear", warmup=0.03):
        self.step = 0
        self.schedule = Schedule(schedule, 1.0, total, warmup)
        self.rates = []

    @property
    def total_steps(self):
        return self.schedule.total_steps

    def replan(self, total):
        self.schedule = self.schedule.replanned(self.step, total)


def run(budget, clock, state, seconds_of, *, every=None, evaluation=0.0):
    """A training whose step n takes ``seconds_of(n)``; returns the lines that were told."""
    lines = []
    budget.begin()
    while state.step < state.total_steps and not budget.over(state):
        state.rates.append(state.schedule.rate(state.step))
        clock.now += seconds_of(state.step)
        state.step += 1
        budget.step_done()
        if every and state.step % every == 0 and state.step < state.total_steps:
            with budget.evaluating():
                clock.now += evaluation
        lines.append(budget.plan(state, every))
        budget.go_on()
    return [line for line in lines if line is not None]


def budget_of(seconds, clock, most=100_000, **ending):
    return TimeBudget(seconds, most, clock(), clock, Ending(**ending), told="a test")


def test_the_steps_that_fit_are_done_and_the_rate_ends_at_zero():
    clock, state = Clock(), State(100_000)
    lines = run(budget_of(600, clock, after=30, evaluation=10), clock, state, lambda n: 2.0)
    assert clock.now - 1000 <= 600 - 40
    assert clock.now - 1000 >= 600 - 40 - MARGIN * 600 - 2 * 2.0
    assert len(lines) == 1 and f"{state.total_steps} steps planned" in lines[0] and "2 s a step" in lines[0]
    assert state.step == state.total_steps and state.rates[-1] < 0.01 and max(state.rates) == 1.0


def test_steps_that_share_a_rollout_are_measured_together():
    clock, state = Clock(), State(100_000)
    budget = budget_of(1200, clock)
    budget.cycle = 8
    lines = run(budget, clock, state, lambda n: 57.0 if n % 8 == 0 else 1.0)
    assert lines and all("at 8 s a step" in line for line in lines)
    assert 1200 - MARGIN * 1200 - 57.0 <= clock.now - 1000 <= 1200 + 57.0 / 2 - MARGIN * 1200


def test_the_first_slow_step_does_not_tell_the_speed():
    clock, state = Clock(), State(100_000)
    run(budget_of(300, clock), clock, state, lambda n: 60.0 if n == 0 else 1.0)
    assert 0.9 * 300 < clock.now - 1000 <= 300 and state.step > 200


def test_a_limit_that_comes_first_is_kept():
    clock, state = Clock(), State(50)
    lines = run(budget_of(3600, clock, most=50), clock, state, lambda n: 1.0)
    assert state.step == 50 and "50 steps planned (all there are)" in lines[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("before", "after"), [(1.0, 3.0), (3.0, 1.0)])
def test_a_speed_that_changes_is_followed_without_a_jump_of_the_rate(schedule, before, after):
    clock, state = Clock(), State(100_000, schedule)
    lines = run(budget_of(1000, clock), clock, state, lambda n: before if clock.now < 1400 else after)
    assert 0.93 * 1000 < clock.now - 1000 <= 1000
    assert len(lines) > 1 and all("planned anew" in line for line in lines[1:])
    falling = state.rates[state.rates.index(max(state.rates)) :]
    drops = [a - b for a, b in itertools.pairwise(falling)]
    assert min(drops) >= 0 and max(drops) < 0.05 and falling[-1] < 0.05


def test_evaluations_on_the_way_are_counted_once_they_are_measured():
    clock, state = Clock(), State(100_000)
    run(budget_of(1000, clock), clock, state, lambda n: 1.0, every=50, evaluation=25.0)
    assert clock.now - 1000 + 25 <= 1000, "the last evaluation must fit too"
    assert clock.now - 1000 > 900


def test_a_run_that_gets_slow_at_its_end_stops_in_time():
    clock, state = Clock(), State(100_000)
    run(budget_of(100, clock, after=5), clock, state, lambda n: 1.0 if clock.now < 1080 else 6.0)
    assert clock.now - 1000 <= 100


def test_noise_is_no_reason_to_plan_anew():
    random = np.random.default_rng(0)
    clock, state = Clock(), State(100_000)
    lines = run(budget_of(1000, clock), clock, state, lambda n: 1.0 + 0.1 * random.standard_normal())
    assert len(lines) <= 3 and 950 < clock.now - 1000 <= 1000


def test_time_that_earlier_processes_spent_counts():
    clock, state = Clock(), State(100_000)
    first = budget_of(1000, clock)
    first.begin()
    for _ in range(100):
        clock.now += 4.0
        state.step += 1
        first.step_done()
        first.plan(state, None)
        first.go_on()
    kept = json.loads(json.dumps(first.state()))
    clock = Clock()
    second = budget_of(1000, clock)
    second.restore(kept)
    assert second.planned and second.spent() == pytest.approx(400)
    run(second, clock, state, lambda n: 4.0)
    assert 550 < clock.now - 1000 <= 600


def test_a_budget_that_is_over_before_the_first_step_is_the_users_to_mend():
    clock = Clock()
    budget = budget_of(10, clock)
    clock.now += 11
    with pytest.raises(UserError, match="over before the first step"):
        budget.begin()


def test_durations_and_what_is_none_of_them():
    seconds = {"90s": 90, "30m": 1800, "2h": 7200, "1h30m": 5400, "1.5h": 5400, "1d": 86400, "1h 5m": 3900}
    seconds |= {"5min": 300, "5 minutes": 300, "90 s": 90, "1,5 hours": 5400, "2 days": 172800, "1 h and 5 min": 3900}
    assert {text: duration_seconds(text) for text in seconds} == seconds
    for text in ("30", "m", "", "0s", "-5m", "5 months", "30m!", "1h30", "1e3s", "1:30", "5 msec", 30):
        with pytest.raises(UserError, match=r"train\.time") as error:
            RunConfig.read({"model": "m", "data": "d", "train": {"time": text}})
        assert "5min" in error.value.hint
