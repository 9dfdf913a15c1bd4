"""A training that is taken up again from its state: every later step is equal to the bit."""

from __future__ import annotations

import json
import operator
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from deltaw.errors import UserError
from deltaw.kernels import loader
from deltaw.training.state import ArithmeticChangedWarning, SavedState
from tests.training.loops import Training


def through_files(saved):
    """As plain bytes and back: JSON and safetensors, nothing pickled."""
    return SavedState(json.loads(json.dumps(saved.values, allow_nan=False)), load(save(saved.tensors)))


def assert_equal_to_the_bit(found, expected):
    facts = operator.attrgetter("step", "epoch", "loss", "learning_rate", "gradient_norm")
    assert [*map(facts, found.steps)] == [*map(facts, expected.steps)][-len(found.steps) :]
    for name, weight in expected.weights().items():
        assert torch.equal(found.weights()[name], weight), name
    sums = operator.attrgetter("steps", "rows", "tokens", "computed_tokens", "label_tokens", "loss_sum")
    assert sums(found.outcome) == sums(expected.outcome)


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
def test_ten_steps_are_five_and_five_more_from_the_state(method, dtype, settings):
    family = "gpt2" if method == "bias" else "qwen3"  # one that has biases
    whole = Training(method, family, dtype, **settings).go(keep=(5,))
    torch.rand(3)  # the process went on with other things
    rest = Training(method, family, dtype, **settings).go(saved=through_files(whole.states[5]))
    assert len(rest.steps) == 5 and rest.steps[0].step == 6
    assert_equal_to_the_bit(rest, whole)
    assert any(not torch.equal(weight, whole.before[name]) for name, weight in whole.weights().items())


@pytest.fixture(scope="module")
def whole():
    """Ten steps, and the states after some of them."""
    return Training().go(keep=(1, 2, 3, 4, 5, 9))


def test_any_step_will_do_also_those_that_are_checked_whatever_others_draw(whole):
    for at in (1, 2, 3, 9):  # the third ends an epoch
        assert_equal_to_the_bit(Training().go(whole.states[at], on_step=lambda step: torch.rand(5)), whole)


def test_a_step_that_was_given_up_half_way_leaves_the_state_before_it(whole):
    run, asked = Training(), []
    # Asked before the fourth step, and after its first microbatch.
    run.go(should_stop=lambda: asked.append(len(run.steps)) or asked.count(3) == 2)
    assert run.outcome.interrupted and run.outcome.steps == 3
    assert all(parameter.grad is None for parameter in run.trained.values())
    left = run.state.state()
    assert left.values == whole.states[3].values | {"sums": left.values["sums"]}
    assert all(torch.equal(tensor, whole.states[3].tensors[name]) for name, tensor in left.tensors.items())
    assert_equal_to_the_bit(Training().go(through_files(left)), whole)


def test_a_training_that_goes_on_with_another_arithmetic_says_so(whole):
    """It goes on all the same, and close to what it would have been; the same arithmetic says nothing."""
    state = whole.states[5]
    assert state.values["arithmetic"] == loader.arithmetic().as_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArithmeticChangedWarning)
        Training().go(state)
    own = loader.arithmetic()
    other = replace(own, fp32="torch") if own.fp32 != "torch" else replace(own, kernels="another")
    with pytest.MonkeyPatch.context() as patch:
        if own.kernels is None:
            patch.setattr(loader, "arithmetic", lambda: other)
        context = loader.computing(None if own.kernels is None else other)
        with context, pytest.warns(ArithmeticChangedWarning, match="not equal to the bit"):
            rest = Training().go(state)
    assert [step.step for step in rest.steps] == [6, 7, 8, 9, 10]
    found, expected = rest.weights(), whole.weights()
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-4) for name in expected)


def test_the_state_of_another_training_is_refused(whole):
    saved = whole.states[2]
    narrow = {k: t[..., :1] if k.startswith("parameter/") else t for k, t in saved.tensors.items()}
    for what, other, state in [
        ("order of rows", Training(seed=6), saved),
        ("order of rows", Training(batch_size=3), saved),
        ("schedule", Training(total_steps=12), saved),
        ("schedule", Training(learning_rate=1e-3), saved),
        ("trained parameters", Training("full"), saved),
        ("shape", Training(), SavedState(saved.values, narrow)),
    ]:
        with pytest.raises(UserError, match=what):
            other.go(saved=state)
        assert all(torch.equal(weight, other.before[name]) for name, weight in other.weights().items())
