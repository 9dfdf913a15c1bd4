"""Training resumed from a saved state is bit-identical in every later step."""

from __future__ import annotations

import json
import operator
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from deltaw.kernels import loader
from deltaw.training.state import ArithmeticChangedWarning, SavedState
from tests.conftest import refusal
from tests.training.loops import Training


def through_files(saved):
    """Serialize and deserialize a state as JSON and safetensors, without pickle."""
    return SavedState(json.loads(json.dumps(saved.values, allow_nan=False)), load(save(saved.tensors)))


def assert_bit_identical(actual, expected):
    step_values = operator.attrgetter("step", "epoch", "loss", "learning_rate", "gradient_norm")
    assert [*map(step_values, actual.steps)] == [*map(step_values, expected.steps)][-len(actual.steps) :]
    for name, weight in expected.weights().items():
        assert torch.equal(actual.weights()[name], weight), name
    sums = operator.attrgetter("steps", "rows", "tokens", "computed_tokens", "label_tokens", "loss_sum")
    assert sums(actual.outcome) == sums(expected.outcome)


@pytest.mark.parametrize(
    ("method", "dtype", "settings"),
    [
        ("lora with dropout", torch.float32, {"schedule": "linear", "warmup": 0.3}),
        ("lora with dropout", torch.bfloat16, {"schedule": "cosine", "warmup": 2}),
        ("lora plus", torch.float32, {"schedule": "constant", "weight_decay": 0.1}),
        ("bias", torch.bfloat16, {"schedule": "linear"}),
        ("full", torch.bfloat16, {"schedule": "cosine", "warmup": 0.2, "betas": (0.8, 0.9)}),
        ("random", torch.bfloat16, {"schedule": "linear", "max_grad_norm": 0.1}),
    ],
)
def test_resumed_run_is_bit_identical(method, dtype, settings):
    family = "gpt2" if method == "bias" else "qwen3"  # one that has biases
    full_run = Training(method, family, dtype, **settings).run(save_steps=(5,))
    torch.rand(3)  # the process uses random numbers in between
    resumed = Training(method, family, dtype, **settings).run(checkpoint=through_files(full_run.states[5]))
    assert len(resumed.steps) == 5 and resumed.steps[0].step == 6
    assert_bit_identical(resumed, full_run)
    assert any(not torch.equal(weight, full_run.initial_weights[name]) for name, weight in full_run.weights().items())


@pytest.fixture(scope="module")
def full_run():
    """Return a run of ten steps with the states after some of them."""
    return Training().run(save_steps=(1, 2, 3, 4, 5, 9))


def test_resume_from_any_step_ignores_global_random_state(full_run):
    for saved_step in (1, 2, 3, 9):  # step 3 is the last of an epoch
        assert_bit_identical(Training().run(full_run.states[saved_step], on_step=lambda step: torch.rand(5)), full_run)


def test_aborted_step_leaves_state_of_previous_step(full_run):
    run = Training()
    step_counts = []
    # The stop is requested after the first microbatch of the fourth step.
    run.run(should_stop=lambda: step_counts.append(len(run.steps)) or step_counts.count(3) == 2)
    assert run.outcome.interrupted and run.outcome.steps == 3
    assert all(parameter.grad is None for parameter in run.trained.values())
    state = run.state.state()
    assert state.values == full_run.states[3].values | {"sums": state.values["sums"]}
    assert all(torch.equal(tensor, full_run.states[3].tensors[name]) for name, tensor in state.tensors.items())
    assert_bit_identical(Training().run(through_files(state)), full_run)


def test_changed_arithmetic_warns_on_resume(full_run):
    """The run continues with similar results. Unchanged arithmetic causes no warning."""
    state = full_run.states[5]
    assert state.values["arithmetic"] == loader.arithmetic().as_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArithmeticChangedWarning)
        Training().run(state)
    current = loader.arithmetic()
    changed = replace(current, fp32="torch") if current.fp32 != "torch" else replace(current, kernels="another")
    with pytest.MonkeyPatch.context() as patch:
        if current.kernels is None:
            patch.setattr(loader, "arithmetic", lambda: changed)
        context = loader.temporary_arithmetic(None if current.kernels is None else changed)
        with context, pytest.warns(ArithmeticChangedWarning, match="not bitwise equal"):
            resumed = Training().run(state)
    assert [step.step for step in resumed.steps] == [6, 7, 8, 9, 10]
    actual = resumed.weights()
    expected = full_run.weights()
    assert all(torch.allclose(actual[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


def test_state_of_another_run_is_rejected(full_run):
    saved = full_run.states[2]
    sliced = {k: t[..., :1] if k.startswith("parameter/") else t for k, t in saved.tensors.items()}
    for message, training, state in [
        ("order of rows", Training(seed=6), saved),
        ("order of rows", Training(batch_size=3), saved),
        ("schedule", Training(total_steps=12), saved),
        ("schedule", Training(learning_rate=1e-3), saved),
        ("trained parameters", Training("full"), saved),
        ("shape", Training(), SavedState(saved.values, sliced)),
    ]:
        refusal(training.run, checkpoint=state, match=message)
        assert all(torch.equal(weight, training.initial_weights[name]) for name, weight in training.weights().items())
