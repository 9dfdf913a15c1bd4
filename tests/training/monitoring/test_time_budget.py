"""Time budgets with a simulated clock: number of planned steps and duration of the run."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from deltaw.settings.config import RunConfig, duration_seconds
from deltaw.training.monitoring.best import MARGIN, OverheadSeconds, TimeBudget
from deltaw.training.optimizer import Schedule
from tests.conftest import refusal


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class State:
    """Training state as required by a budget, with a real schedule."""

    def __init__(self, total, schedule="linear", warmup=0.03):
        self.step = 0
        self.schedule = Schedule(schedule, 1.0, total, warmup)
        self.rates = []

    @property
    def total_steps(self):
        return self.schedule.total_steps

    def replan(self, total):
        self.schedule = self.schedule.replanned(self.step, total)


def run(budget, clock, state, seconds_of, *, eval_every=None, evaluation=0.0):
    """Simulate a training with steps of ``seconds_of(step)`` seconds and return the lines that the budget reports."""
    lines = []
    budget.start()
    while state.step < state.total_steps and not budget.is_over(state):
        state.rates.append(state.schedule.rate(state.step))
        clock.now += seconds_of(state.step)
        state.step += 1
        budget.step_done()
        if eval_every and state.step % eval_every == 0 and state.step < state.total_steps:
            with budget.evaluating():
                clock.now += evaluation
        lines.append(budget.plan(state, eval_every))
        budget.start_step()
    return [line for line in lines if line is not None]


def budget_of(seconds, clock, max_steps=100_000, **overhead):
    return TimeBudget(seconds, max_steps, clock(), clock, OverheadSeconds(**overhead), label="a test")


def test_run_fills_budget_and_rate_decays_to_zero():
    clock = Clock()
    state = State(100_000)
    lines = run(budget_of(600, clock, after=30, evaluation=10), clock, state, lambda n: 2.0)
    assert clock.now - 1000 <= 600 - 40 and clock.now - 1000 >= 600 - 40 - MARGIN * 600 - 2 * 2.0
    assert len(lines) == 1 and f"{state.total_steps} steps planned" in lines[0] and "2 s a step" in lines[0]
    assert state.step == state.total_steps and state.rates[-1] < 0.01 and max(state.rates) == 1.0


def test_steps_of_one_rollout_are_measured_together():
    clock = Clock()
    state = State(100_000)
    budget = budget_of(1200, clock)
    budget.cycle = 8
    lines = run(budget, clock, state, lambda n: 57.0 if n % 8 == 0 else 1.0)
    assert lines and all("at 8 s a step" in line for line in lines)
    assert 1200 - MARGIN * 1200 - 57.0 <= clock.now - 1000 <= 1200 + 57.0 / 2 - MARGIN * 1200


def test_slow_first_step_does_not_determine_speed():
    clock = Clock()
    state = State(100_000)
    run(budget_of(300, clock), clock, state, lambda n: 60.0 if n == 0 else 1.0)
    assert 0.9 * 300 < clock.now - 1000 <= 300 and state.step > 200


def test_step_limit_below_budget_is_respected():
    clock = Clock()
    state = State(50)
    lines = run(budget_of(3600, clock, max_steps=50), clock, state, lambda n: 1.0)
    assert state.step == 50 and "50 steps planned (all steps)" in lines[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("before", "after"), [(1.0, 3.0), (3.0, 1.0)])
def test_changed_speed_is_replanned_without_rate_jump(schedule, before, after):
    clock = Clock()
    state = State(100_000, schedule)
    lines = run(budget_of(1000, clock), clock, state, lambda n: before if clock.now < 1400 else after)
    assert 0.93 * 1000 < clock.now - 1000 <= 1000
    assert len(lines) > 1 and all("planned again" in line for line in lines[1:])
    falling = state.rates[state.rates.index(max(state.rates)) :]
    drops = [a - b for a, b in itertools.pairwise(falling)]
    assert min(drops) >= 0 and max(drops) < 0.05 and falling[-1] < 0.05


def test_measured_evaluations_count_towards_budget():
    clock = Clock()
    state = State(100_000)
    run(budget_of(1000, clock), clock, state, lambda n: 1.0, eval_every=50, evaluation=25.0)
    assert clock.now - 1000 + 25 <= 1000, "the last evaluation must fit too"
    assert clock.now - 1000 > 900


def test_run_that_slows_down_stops_in_time():
    clock = Clock()
    state = State(100_000)
    run(budget_of(100, clock, after=5), clock, state, lambda n: 1.0 if clock.now < 1080 else 6.0)
    assert clock.now - 1000 <= 100


def test_noise_rarely_triggers_replanning():
    random = np.random.default_rng(0)
    clock = Clock()
    state = State(100_000)
    lines = run(budget_of(1000, clock), clock, state, lambda n: 1.0 + 0.1 * random.standard_normal())
    assert len(lines) <= 3 and 950 < clock.now - 1000 <= 1000


def test_time_of_earlier_processes_counts():
    clock = Clock()
    state = State(100_000)
    first = budget_of(1000, clock)
    first.start()
    for _ in range(100):
        clock.now += 4.0
        state.step += 1
        first.step_done()
        first.plan(state, None)
        first.start_step()
    saved = json.loads(json.dumps(first.state()))
    clock = Clock()
    second = budget_of(1000, clock)
    second.restore(saved)
    assert second.planned and second.spent() == pytest.approx(400)
    run(second, clock, state, lambda n: 4.0)
    assert 550 < clock.now - 1000 <= 600


def test_budget_exceeded_before_first_step_raises():
    clock = Clock()
    budget = budget_of(10, clock)
    clock.now += 11
    refusal(budget.start, match="over before the first step")


def test_durations_are_parsed_and_invalid_ones_rejected():
    seconds = {"90s": 90, "30m": 1800, "2h": 7200, "1h30m": 5400, "1.5h": 5400, "1d": 86400, "1h 5m": 3900}
    seconds |= {"5min": 300, "5 minutes": 300, "90 s": 90, "1,5 hours": 5400, "2 days": 172800, "1 h and 5 min": 3900}
    assert {text: duration_seconds(text) for text in seconds} == seconds
    for text in ("30", "m", "", "0s", "-5m", "5 months", "30m!", "1h30", "1e3s", "1:30", "5 msec", 30):
        error = refusal(RunConfig.read, {"model": "m", "data": "d", "train": {"time": text}}, match=r"train\.time")
        assert "5min" in error.hint
