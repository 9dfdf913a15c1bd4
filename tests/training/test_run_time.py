"""Predicted time of runs: arithmetic, the sizes of microbatches, measured blocks, caching, and search under a limit."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from unittest import mock

import pytest
import torch

from deltaw.data.row_reader import RunData
from deltaw.memory.plan import Plan
from deltaw.memory.simulation import fake_tensors
from deltaw.reports.plan import time_lines
from deltaw.reports.progress import summary_rows
from deltaw.runs.fit import fit
from deltaw.settings.config import RunConfig
from deltaw.training.callbacks import FunctionCallback
from deltaw.training.planning import fake_model, run_time, step_rates
from deltaw.training.planning import plan_run as planning
from deltaw.training.planning.budget import fitting_times
from deltaw.training.planning.plan_cache import load_cached_plans
from deltaw.training.planning.run_time import (
    BUSY_REASON,
    EXPECTED_LENGTH,
    Generation,
    Microbatches,
    MicrobatchTime,
    StepRates,
    Workload,
    interpolate,
    seconds_by_phase,
    timed_plan,
)
from deltaw.training.session import read_data
from tests.byte_models import save_model, tiny_llama
from tests.conftest import refusal
from tests.reports.test_plan import make_plan
from tests.training.runs import fit_with_output

SIZES = (100, 400, 1000)


def linear_rates(**changes: object) -> StepRates:
    """Return rates with 1 ms per token in the blocks, a third of it in the forward pass, and 2 ms per label."""
    points = tuple(MicrobatchTime(n, n / 10, n / 1e3, n / 3e3, n / 4e3, n / 5e3) for n in SIZES)
    values = {"evaluation": 0.5, "evaluation_head": 0.25, "update": 0.125, "decode": 0.01}
    return StepRates(points, **{**values, **changes})


STEPS = (Microbatches((300, 200), 50), Microbatches((500,), 50))
WORK = Workload(key="some blocks", steps=STEPS, total_steps=10, full_steps=10)


def test_steps_are_interpolated_from_measured_sizes():
    rates = linear_rates()
    assert rates.training_seconds(Microbatches((300, 200), 50)) == pytest.approx(0.5 + 2 * 0.05)
    assert rates.evaluation_seconds(Microbatches((300,), 30)) == pytest.approx(0.5 * 0.1 + 0.25 * 0.06)
    repeated = Microbatches((300,), 30, (300,))
    assert rates.training_seconds(repeated) > rates.training_seconds(replace(repeated, repeated=())) + 0.04
    assert interpolate([10, 20], [1.0, 3.0], 15) == 2.0
    assert interpolate([10, 20], [1.0, 3.0], 40) == 6.0  # at most in proportion
    assert interpolate([10, 20], [2.0, 2.0], 5) == 2.0 and interpolate([10, 20], [1.0, 3.0], 4) >= 0.4
    assert rates.covers(4000) and not rates.covers(4001)


def test_phases_follow_from_workload():
    rates = linear_rates()
    base = seconds_by_phase(WORK, rates)
    step = 0.125 + (rates.training_seconds(WORK.steps[0]) + rates.training_seconds(WORK.steps[1])) / 2
    assert base["training"] == pytest.approx(10 * step)
    assert seconds_by_phase(replace(WORK, total_steps=20, full_steps=20), rates)["training"] == pytest.approx(20 * step)
    # Stored features replace the lower blocks, which take three quarters of the time here.
    stored = seconds_by_phase(replace(WORK, full_steps=4), rates)["training"]
    assert stored == pytest.approx(10 * step - 6 * 0.5 * 0.75)
    general = seconds_by_phase(replace(WORK, general_tokens=100), rates)["training"]
    assert general >= base["training"] + 10 * 0.1
    evaluated = replace(
        WORK, evaluated=Microbatches((400, 400), 80), evaluations=3, reference=Microbatches((1000,), 100)
    )
    phases = seconds_by_phase(evaluated, rates)
    assert (
        phases["evaluating"] == pytest.approx(3 * rates.evaluation_seconds(evaluated.evaluated))
        and not base["evaluating"]
    )
    assert phases["preparing"] - base["preparing"] == pytest.approx(rates.evaluation_seconds(evaluated.reference))
    assert seconds_by_phase(WORK, rates, 10**10)["loading"] > base["loading"] + 1
    rollouts = replace(WORK, generations=(Generation(32, 50, 10, "training"),))
    updates = 10 * 0.125
    generated = 10 * 50 * 0.01 * 32 / rates.decode_tokens
    expected = EXPECTED_LENGTH * (base["training"] - updates + generated) + updates
    assert seconds_by_phase(rollouts, rates)["training"] == pytest.approx(expected)


def test_plan_contains_sum_of_phases_and_time_limit(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path))
    plan = timed_plan(make_plan("lora", 1), WORK, linear_rates(), config)
    assert plan.seconds == pytest.approx(sum(plan.seconds_by_phase.values()))
    assert plan.seconds_per_step == pytest.approx(plan.seconds_by_phase["training"] / 10)
    assert plan.as_dict()["seconds"] == plan.seconds and "workload" not in plan.as_dict()
    limited = timed_plan(make_plan("lora", 1), WORK, linear_rates(), config.with_train(time="6s"))
    assert limited.seconds == pytest.approx(6) and limited.seconds_per_step == plan.seconds_per_step
    assert Workload.from_dict(WORK.as_dict()) == WORK


@pytest.mark.parametrize(
    "damage", [{"points": 3}, {"points": []}, {"update": "x"}, {"update": -1.0}, {"decode": float("nan")}]
)
def test_damaged_rates_are_measured_again(damage):
    stored = asdict(linear_rates())
    assert StepRates.from_dict(json.loads(json.dumps(stored))) == linear_rates()
    with pytest.raises(ValueError, match="StepRates"):
        StepRates.from_dict({**stored, **damage})
    with pytest.raises(ValueError, match="Workload"):
        Workload.from_dict({**WORK.as_dict(), "steps": damage, "total_steps": -1})


def test_uncertain_time_is_reported(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path))
    plans = [timed_plan(make_plan("lora", 1), WORK, linear_rates(uncertain=text), config) for text in ("", BUSY_REASON)]
    certain, uncertain = ("\n".join(time_lines(plan)) for plan in plans)
    assert "per step" in certain and "uncertain" not in certain and BUSY_REASON in uncertain
    assert time_lines(make_plan("lora", 1)) == []


def inputs(config: RunConfig) -> tuple:
    return (config, *read_data(config))


@pytest.mark.parametrize("share", [False, True])
def test_workload_has_the_microbatches_of_the_run(share, settings, tmp_path):
    train = {"epochs": 2, "tokens_per_pass": 48, "samples": 0, "share_prefixes": share}
    config = RunConfig.read(settings(tmp_path / "run", train=train))
    workload = Workload.from_dict(planning.plan_run(*inputs(config)).workload)
    computed: list[int] = []
    fit(config, callback=FunctionCallback(on_step=lambda step: computed.append(step.computed_tokens)))
    assert [sum(step.tokens) for step in workload.steps] == computed
    assert workload.total_steps == workload.full_steps == len(computed)
    assert any(len(step.tokens) > 1 for step in workload.steps)
    assert workload.evaluations == 2 and sum(workload.evaluated.tokens) > 0  # base model and last step


def measured_rates(config: RunConfig, task: object, data: RunData) -> StepRates:
    """Measure with a clock that advances by one at each call."""
    fake = fake_model.FakeModel.of(config, task, data)
    with fake_tensors():
        session = fake.assemble(config, task, data)
        with session.running():
            pass
    ticks = itertools.count()
    return step_rates.measure(session, step_rates.cpu_usage(), clock=lambda: float(next(ticks)), limit=1e9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measured_blocks_are_scaled_to_all_blocks(checkpointing, settings, tmp_path):
    folder = save_model(tiny_llama(num_hidden_layers=5), tmp_path / "five")
    train = {"checkpointing": checkpointing, "batch_size": 8}
    config = RunConfig.read(settings(tmp_path / "run", model=str(folder), train=train))
    rates = measured_rates(*inputs(config))
    sizes = [point.tokens for point in rates.points]
    workload = Workload.from_dict(planning.plan_run(*inputs(config)).workload)
    assert sizes == sorted(sizes) and len(sizes) > 1 and sizes[-1] <= workload.largest_microbatch
    for point in rates.points:
        assert point.forward == 5  # two calls of the clock around each measured block
        assert point.blocks >= 10 and point.upper == point.blocks
        assert point.labels > 0 and point.head > 0
    assert rates.update > 0 and rates.decode > 0


def test_frozen_blocks_have_no_backward_pass(settings, tmp_path):
    folder = save_model(tiny_llama(num_hidden_layers=6), tmp_path / "six")
    all_blocks, upper = (
        measured_rates(*inputs(RunConfig.read(settings(tmp_path / "run", model=str(folder), lora={"layers": layers}))))
        for layers in (None, "4-")
    )
    for whole, partial in zip(all_blocks.points, upper.points, strict=True):
        assert partial.forward == whole.forward == 6
        assert partial.blocks - partial.forward == pytest.approx((whole.blocks - whole.forward) / 3)
        assert partial.upper < partial.blocks


@pytest.fixture
def measurement(monkeypatch, tmp_path) -> mock.Mock:
    """Replace the measurement, with an empty cache."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_time, "_uncertain_rates", {})
    measure = mock.Mock(return_value=linear_rates())
    monkeypatch.setattr(planning, "measure", measure)
    return measure


@pytest.mark.timed
def test_rates_are_measured_once_per_model_and_adapter(measurement, settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run"))
    first = planning.plan(config)
    assert first.seconds and measurement.call_count == 1
    longer = planning.plan(config.with_train(epochs=3))
    assert measurement.call_count == 1 and longer.seconds > first.seconds
    assert longer.seconds_per_step == pytest.approx(first.seconds_per_step, rel=0.2)
    assert load_cached_plans(config, ["lora"]).plans["lora"].seconds == pytest.approx(first.seconds, rel=0.01)
    planning.plan(RunConfig.read(settings(tmp_path / "run", lora={"rank": 2})))
    assert measurement.call_count == 2


@pytest.mark.timed
def test_rates_of_busy_machine_are_not_stored(measurement, settings, tmp_path, monkeypatch):
    measurement.return_value = linear_rates(uncertain=BUSY_REASON)
    config = RunConfig.read(settings(tmp_path / "run"))
    assert planning.plan(config).time_uncertain == BUSY_REASON
    planning.plan(config)
    assert measurement.call_count == 1  # this process uses them
    monkeypatch.setattr(run_time, "_uncertain_rates", {})
    assert load_cached_plans(config, ["lora"]) is None
    measurement.return_value = linear_rates()
    assert planning.plan(config).time_uncertain == "" and measurement.call_count == 2


@pytest.mark.timed
def test_other_programs_make_the_prediction_uncertain(settings, tmp_path, monkeypatch):
    config = RunConfig.read(settings(tmp_path / "run"))
    for others, expected in ((0.0, ""), (0.9, BUSY_REASON)):
        monkeypatch.setattr(step_rates, "other_cpus", lambda _, others=others: others)
        monkeypatch.setattr(step_rates, "STEADY_RATIO", 1e9)
        assert measured_rates(*inputs(config)).uncertain == expected


@pytest.mark.timed
def test_model_that_cannot_be_measured_is_planned_without_time(measurement, settings, tmp_path):
    measurement.side_effect = RuntimeError("an operator without weights")
    plan = planning.plan(RunConfig.read(settings(tmp_path / "run")))
    assert plan.peak_bytes > 0 and plan.seconds is None and "an operator without weights" in plan.time_uncertain


@pytest.mark.timed
@pytest.mark.planned
def test_run_reports_predicted_and_measured_time(settings, tmp_path):
    result, output = fit_with_output(settings(tmp_path / "run"))
    summary = json.loads(json.dumps(result.as_dict()))
    assert summary["planned_seconds"] > 0 and summary["total_seconds"] > 0
    assert "time: about " in output and " per step" in output
    assert " predicted): " in dict(summary_rows(result))["time"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["plan"]["seconds"] > 0 and record["plan"]["seconds_per_step"] > 0


def synthetic_plan(config: RunConfig, *_: object) -> Plan:
    """Return a plan with 2 s per step in bf16, 4 s in fp32 and 1 s in int8, plus 10 s."""
    seconds = {"bf16": 2.0, "fp32": 4.0, "int8": 1.0}[config.precision]
    steps = 100 * config.train.epochs
    phases = {"loading": 10.0, "training": seconds * steps}
    size = 1000 if config.train.checkpointing else 2000
    time = {"seconds_per_step": seconds, "seconds": sum(phases.values()), "seconds_by_phase": phases}
    return replace(make_plan("lora", 1), precision=config.precision, peak_resident_bytes=size, **time)


@pytest.fixture
def search(monkeypatch, settings, tmp_path):
    monkeypatch.setattr("deltaw.training.planning.budget.plan_run", synthetic_plan)
    data = mock.Mock(train=[0] * 300, held_out=[0] * 2)

    def find(seconds: float, memory: int = 10**9, precision: str = "auto", **train: object) -> list:
        config = RunConfig.read(settings(tmp_path / "run", precision=precision, train={"epochs": 2, **train}))
        return fitting_times(config, None, data, seconds, memory)

    return find


def test_time_budget_reduces_epochs_then_rows(search):
    everything = search(10_000)
    assert [f.precision for f in everything] == ["int8", "bf16", "fp32"]
    assert all((f.epochs, f.rows, f.steps) == (2, None, 200) for f in everything)
    fewer = {f.precision: f for f in search(300)}
    assert (fewer["int8"].epochs, fewer["int8"].rows) == (2, None)
    assert (fewer["bf16"].epochs, fewer["bf16"].rows, fewer["bf16"].steps) == (1.37, None, 137)
    assert (fewer["fp32"].epochs, fewer["fp32"].steps) == (1, 68)
    assert fewer["fp32"].rows == 68 * 3 + 2  # with the rows that are held out from the file
    assert all(f.seconds <= 300 for f in fewer.values())
    assert [f.precision for f in search(300)] == ["int8", "bf16", "fp32"]
    assert json.dumps(fewer["fp32"].as_dict()) and fewer["fp32"].as_dict()["seconds_per_step"] == 4.0


def test_time_budget_respects_memory_and_settings(search):
    assert all(f.checkpointing is True for f in search(10_000, memory=1500))
    assert [f.precision for f in search(10_000, precision="fp32")] == ["fp32"]
    error = refusal(search, 11, precision="fp32")
    assert error.location == "--fit-time" and "14 seconds" in error.message
    refusal(search, 10_000, memory=10, match="no settings fit")


def test_random_values_replace_fake_tensors(settings, tmp_path):
    config = RunConfig.read(settings(tmp_path / "run", precision="int8"))
    fake = fake_model.FakeModel.of(*inputs(config))
    blocks = list(fake.model.model.layers)
    step_rates.fill_with_random_values(fake.model, blocks[1:])
    assert all(torch.isfinite(p.float()).all() for p in blocks[0].parameters())
    assert all(p.numel() == 0 for p in blocks[1].parameters()) and fake.model.lm_head.weight.float().std() > 0
