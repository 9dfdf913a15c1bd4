"""A training that ends by itself: on a tiny model, with real steps."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch

from deltaw.errors import UserError
from deltaw.experiments.folder import Budget
from deltaw.experiments.until_flat import BestPoint, Cooldown
from deltaw.experiments.worker import Stopped


def validated(trial):
    with trial.session.running():
        return trial.session.evaluate(trial.validation).metrics["loss"]


@pytest.mark.parametrize(("method", "rate"), [("lora", 5e-2), pytest.param("full", 5e-3, marks=pytest.mark.slow)])
def test_a_training_ends_once_its_loss_is_flat(try_out, method, rate):
    trial = try_out(method=method, train={"eval_every": 2})
    rates = []
    curve = trial.until_flat(rate, Budget(400), on_step=lambda step: rates.append(step.learning_rate))
    assert curve.flattened and curve.outcome.steps < 400
    assert curve.points[0][0] == 0 and curve.points[0][1] > 2 * curve.best_loss
    ended = curve.points[-2][0]
    assert curve.outcome.steps == ended + max(1, round(0.2 * ended))
    warm = math.ceil(0.03 * 400)
    assert rates[:warm] == sorted(rates[:warm]) and set(rates[warm:ended]) == {rate}
    cooled = len(rates) - ended
    assert rates[ended:] == pytest.approx([rate * (cooled - n) / (cooled + 1) for n in range(cooled)])
    assert Cooldown("constant", rate, total_steps=14, warmup=2, begin=10).rate(9) == rate


@pytest.mark.each_value
@pytest.mark.parametrize("method", ["lora", "random", "full", "prompt"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_the_end_the_parameters_are_those_of_the_lowest_loss(try_out, method, precision):
    trial = try_out(method=method, precision=precision, train={"eval_every": 2})
    curve = trial.until_flat(0.3, Budget(24))  # a rate at which the loss goes up and down
    lowest = min(loss for step, loss in curve.points if step)
    assert curve.best_loss == lowest and dict(curve.points)[curve.best_step] == lowest
    assert validated(trial) == pytest.approx(lowest, rel=1e-6)


def test_a_budget_that_ends_first_is_kept_to_and_told_and_the_same_training_again_is_the_same(try_out):
    trial = try_out(lora={"dropout": 0.2})
    curve = trial.until_flat(1e-2, Budget(12))
    assert not curve.flattened and curve.outcome.steps == 12
    assert [step for step, _ in curve.points][-2:] == [10, 12]
    assert trial.until_flat(3e-2, Budget(1)).outcome.steps == 1
    assert trial.until_flat(1e-2, Budget(12)).points == curve.points


def test_time_ends_a_training_too(try_out, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("deltaw.experiments.until_flat.time.monotonic", lambda: float(next(clock)))
    curve = try_out(train={"eval_every": 5}).until_flat(1e-2, Budget(seconds=24.0))
    # One tick a step: 20 steps of 24, and a fifth of them to cool down.
    assert not curve.flattened and 18 <= curve.points[-2][0] <= 20
    assert curve.outcome.steps == curve.points[-2][0] + 4


def test_the_cooldown_begins_where_the_loss_was_lowest(try_out, monkeypatch):
    """With a made-up loss that is lowest at step 4, the last steps start from the parameters of step 4."""
    trial = try_out(train={"eval_every": 4})
    made_up = iter([0.5, *map(float, range(1, 11))])
    seen = {}

    def parameters():
        named = trial.session.method.parameters(trial.session.model)
        return torch.cat([p.detach().flatten() for _, p in named])

    monkeypatch.setattr(trial.session, "evaluate", lambda rows: SimpleNamespace(metrics={"loss": next(made_up)}))
    curve = trial.until_flat(1e-2, Budget(24), on_step=lambda step: seen.__setitem__(step.step, parameters().clone()))
    assert curve.best_step == 4
    assert torch.equal(parameters(), seen[4])
    # The first cooled step moves little from step 4, and far from step 20.
    assert (seen[21] - seen[4]).norm() < (seen[21] - seen[20]).norm()


def test_other_seeds_train_otherwise_on_the_same_rows(try_out):
    one = try_out(train={"seed": 0}, data={"seed": 0})
    two = try_out(train={"seed": 1}, data={"seed": 0})
    for rows in ("training", "validation"):
        assert [e.row for e in getattr(one, rows)] == [e.row for e in getattr(two, rows)]
    assert [e.row for e in one.session.data.held_out] == [e.row for e in two.session.data.held_out]
    assert one.until_flat(1e-2, Budget(3)).points != two.until_flat(1e-2, Budget(3)).points


def test_a_divergence_and_a_signal_are_told(try_out, monkeypatch):
    trial = try_out(method="full", train={"max_grad_norm": None})
    with pytest.raises(UserError, match="diverged"):
        trial.until_flat(1e6, Budget(50))
    trial = try_out()
    stopped = functools.partial(trial.session.train, should_stop=lambda: True)
    monkeypatch.setattr(trial.session, "train", stopped)
    with pytest.raises(Stopped):
        trial.until_flat(1e-3, Budget(5))


def test_a_best_point_gives_back_every_bit():
    parameters = [torch.randn(3, 5), torch.randn(7).bfloat16(), torch.zeros(0, 4), torch.tensor(2.5)]
    with BestPoint() as best:
        best.take(3, 0.5, parameters)
        other = [torch.empty_like(p) for p in parameters]
        best.put_back(other)
        assert all(torch.equal(a, b) for a, b in zip(parameters, other, strict=True))
        best.take(5, 0.4, [p + 1 for p in parameters])
        best.put_back(other)
        assert (best.step, best.loss) == (5, 0.4)
        assert torch.equal(other[0], parameters[0] + 1)
        rounded = [torch.empty(3, 5, dtype=torch.bfloat16), *other[1:]]
        best.put_back(rounded)
        assert torch.equal(rounded[0], (parameters[0] + 1).bfloat16())
