"""Dynamic loss scaling: steps equal those in fp32, and a step with gradients that overflow is repeated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deltaw.training import state as training_state
from deltaw.training.loop import train
from deltaw.training.objective import Objective
from deltaw.training.process import random_state, set_random_state
from deltaw.training.state import NotFiniteError, TrainOptions, TrainState
from deltaw.training.trained_check import UntrainedParameterError
from tests.training.loops import SPLIT, Training, examples

FP16_MAX = torch.finfo(torch.float16).max


class Product(Objective):
    """Loss whose gradient, ``factor`` times the scale, is computed in fp16. Four units per step."""

    def __init__(self, factor):
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.factor = factor

    def __call__(self, batch):
        return (self.weight.half() * self.factor).float().sum()

    def units(self, rows):
        return 4


def run(objective, **options):
    """Train the weight of ``objective`` for eight steps. Return the outcome, the steps and the repetitions."""
    steps = []
    repeated = []
    defaults = {"learning_rate": 0.1, "total_steps": 8, "batch_size": 2, "loss_scaling": True}
    events = {"on_step": steps.append, "on_skip": repeated.append}
    outcome = train(objective, [objective.weight], examples(2), SPLIT, **{**defaults, **events, **options})
    return outcome, steps, repeated


def test_steps_match_fp32_and_report_the_scale():
    scaled = Training("lora", dtype=torch.float16, loss_scaling=True).run()
    plain = Training("lora", dtype=torch.float32).run()
    assert [step.loss for step in scaled.steps] == pytest.approx([step.loss for step in plain.steps], rel=2e-2)
    norms = [step.gradient_norm for step in scaled.steps]
    assert norms == pytest.approx([step.gradient_norm for step in plain.steps], rel=5e-2)
    assert {step.metrics["loss_scale"] for step in scaled.steps} == {2.0**16}
    assert "loss_scale" not in plain.steps[0].metrics


def test_gradients_below_the_range_of_fp16_are_trained():
    factor = 2.0**-26
    assert run(Product(factor))[1][0].gradient_norm == factor / 4
    with pytest.raises(UntrainedParameterError):
        run(Product(factor), loss_scaling=False)


def test_overflow_halves_the_scale_and_repeats_the_step():
    outcome, steps, repeated = run(Product(8.0))
    # The gradient is twice the scale, and above 65504 for the first two scales.
    assert [event.step for event in repeated] == [1, 1] and outcome.skipped == 0
    assert [event.as_dict()["loss_scale"] for event in repeated] == [2.0**16, 2.0**15]
    assert "repeated" in repeated[0].as_dict()
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {step.metrics["loss_scale"] for step in steps} == {2.0**14}
    assert [step.gradient_norm for step in steps] == [2.0] * 8


def test_gradients_are_clipped_without_the_scale():
    scaled = Product(0.5)
    plain = Product(0.5)
    norms = [[step.gradient_norm for step in run(scaled, max_grad_norm=0.1)[1]]]
    norms += [[step.gradient_norm for step in run(plain, max_grad_norm=0.1, loss_scaling=False)[1]]]
    assert norms[0] == norms[1] == [0.125] * 8
    assert scaled.weight.item() == plain.weight.item() != 1.0


def test_scale_grows_after_steps_without_overflow_and_is_resumed(monkeypatch):
    monkeypatch.setattr(training_state, "LOSS_SCALE_INTERVAL", 2)
    whole, stopped, resumed = (Product(0.75) for _ in range(3))
    _, steps, repeated = run(whole)
    # A quarter of 2 ** 18 is above 65504.
    assert [step.metrics["loss_scale"] for step in steps] == [2.0**16] * 2 + [2.0**17] * 6
    assert [event.step for event in repeated] == [5, 7]

    states = []
    run(stopped, on_begin=states.append, should_stop=lambda: states[0].step >= 3)
    _, later, repeated = run(resumed, checkpoint=states[0].state())
    assert later[0].metrics["loss_scale"] == 2.0**17 and [event.step for event in repeated] == [5, 7]
    assert resumed.weight.item() == whole.weight.item()


def test_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(NotFiniteError, match="diverged") as error:
        run(Product(FP16_MAX * 2))
    assert "precision: fp32" in error.value.hint


class MpsCondition:
    """A condition on mps, where torch's fused AdamW ignores it."""

    device = torch.device("mps")

    def __init__(self, value):
        self.value = value

    def __bool__(self):
        return self.value

    def float(self):
        return torch.zeros(())


@pytest.mark.parametrize("condition", [True, False])
def test_update_on_mps_checks_the_condition_itself(condition):
    weight = nn.Parameter(torch.ones(1))
    state = TrainState([weight], 4, TrainOptions(learning_rate=0.1, total_steps=2))
    weight.grad = torch.ones(1)
    state.update(unless=MpsCondition(condition))
    assert (weight.item() == 1.0) is condition and weight.grad is None


def test_random_state_of_mps_is_saved_and_restored(monkeypatch):
    restored = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7], dtype=torch.uint8))
    monkeypatch.setattr(torch.mps, "set_rng_state", restored.append)
    states = random_state()
    set_random_state(states)
    assert restored == [states["mps"]]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    set_random_state(states)
    assert len(restored) == 1 and "mps" not in random_state()
