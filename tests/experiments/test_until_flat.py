"""Training until the validation loss is flat, with real steps of a tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deltaw.errors import UserError
from deltaw.experiments.folder import Budget
from deltaw.experiments.trial import TrainingStopped
from deltaw.experiments.until_flat import Cooldown
from deltaw.training.callbacks import FunctionCallback


def validation_loss(trial):
    with trial.session.running():
        return trial.session.evaluate(trial.validation).metrics["loss"]


@pytest.mark.parametrize(("method", "rate"), [("lora", 5e-2), pytest.param("full", 5e-3, marks=pytest.mark.slow)])
def test_training_stops_when_loss_is_flat(make_trial, method, rate):
    trial = make_trial(method=method, train={"eval_every": 2})
    rates = []
    curve = trial.until_flat(rate, Budget(400), FunctionCallback(on_step=lambda step: rates.append(step.learning_rate)))
    assert curve.flattened and curve.outcome.steps < 400
    assert curve.points[0][0] == 0 and curve.points[0][1] > 2 * curve.best_loss
    cooldown_start = curve.points[-2][0]
    assert curve.outcome.steps == cooldown_start + max(1, round(0.2 * cooldown_start))
    num_warmup = math.ceil(0.03 * 400)
    assert rates[:num_warmup] == sorted(rates[:num_warmup]) and set(rates[num_warmup:cooldown_start]) == {rate}
    num_cooldown = len(rates) - cooldown_start
    expected = [rate * (num_cooldown - n) / (num_cooldown + 1) for n in range(num_cooldown)]
    assert rates[cooldown_start:] == pytest.approx(expected)
    assert Cooldown("constant", rate, total_steps=14, warmup=2, cooldown_start=10).rate(9) == rate


@pytest.mark.each_value
@pytest.mark.parametrize("method", ["lora", "random", "full", "prompt"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_final_parameters_have_lowest_loss(make_trial, method, precision):
    trial = make_trial(method=method, precision=precision, train={"eval_every": 2})
    curve = trial.until_flat(0.3, Budget(24))  # the loss oscillates at this rate
    min_loss = min(loss for step, loss in curve.points if step)
    assert curve.best_loss == min_loss and dict(curve.points)[curve.best_step] == min_loss
    assert validation_loss(trial) == pytest.approx(min_loss, rel=1e-6)


def test_budget_limits_training_and_repetition_is_equal(make_trial):
    trial = make_trial(lora={"dropout": 0.2})
    curve = trial.until_flat(1e-2, Budget(12))
    assert not curve.flattened and curve.outcome.steps == 12
    assert [step for step, _ in curve.points][-2:] == [10, 12]
    assert trial.until_flat(3e-2, Budget(1)).outcome.steps == 1
    assert trial.until_flat(1e-2, Budget(12)).points == curve.points
    assert not (Path(trial.config.output) / "best").exists()


def test_time_limit_stops_training(make_trial, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("deltaw.experiments.until_flat.time.monotonic", lambda: float(next(clock)))
    curve = make_trial(train={"eval_every": 5}).until_flat(1e-2, Budget(seconds=24.0))
    # One clock tick per step: 20 of 24 steps, then one fifth of them for the cooldown.
    assert not curve.flattened and 18 <= curve.points[-2][0] <= 20
    assert curve.outcome.steps == curve.points[-2][0] + 4


def test_cooldown_starts_from_lowest_loss(make_trial, monkeypatch):
    """With synthetic losses that are lowest at step 4, the last steps start from the parameters of step 4."""
    trial = make_trial(train={"eval_every": 4})
    losses = iter([0.5, *map(float, range(1, 11))])
    parameters_by_step = {}

    def parameters():
        named_parameters = trial.session.method.parameters(trial.session.model)
        return torch.cat([p.detach().flatten() for _, p in named_parameters])

    monkeypatch.setattr(trial.session, "evaluate", lambda rows: SimpleNamespace(metrics={"loss": next(losses)}))
    store = parameters_by_step.__setitem__
    callback = FunctionCallback(on_step=lambda step: store(step.step, parameters().clone()))
    curve = trial.until_flat(1e-2, Budget(24), callback)
    assert curve.best_step == 4
    assert torch.equal(parameters(), parameters_by_step[4])
    # The first cooldown step is close to step 4 and far from step 20.
    early, late, last = (parameters_by_step[step] for step in (4, 20, 21))
    assert (last - early).norm() < (last - late).norm()


def test_seeds_differ_on_equal_rows(make_trial):
    first = make_trial(train={"seed": 0}, data={"seed": 0})
    second = make_trial(train={"seed": 1}, data={"seed": 0})
    for rows in ("training", "validation"):
        assert [e.row for e in getattr(first, rows)] == [e.row for e in getattr(second, rows)]
    assert [e.row for e in first.session.data.held_out] == [e.row for e in second.session.data.held_out]
    assert first.until_flat(1e-2, Budget(3)).points != second.until_flat(1e-2, Budget(3)).points


def test_divergence_and_stop_signal_raise(make_trial):
    trial = make_trial(method="full", train={"max_grad_norm": None})
    with pytest.raises(UserError, match="diverged"):
        trial.until_flat(1e6, Budget(50))
    trial = make_trial()
    with pytest.raises(TrainingStopped):
        trial.until_flat(1e-3, Budget(5), FunctionCallback(should_stop=lambda: True))
