"""Outputs, gradients, training steps and initial factors match PEFT 0.21."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw.lora import LoRAConfig, adapter_parameters, attach
from tests.lora.models import (
    FAMILIES,
    KINDS,
    EveryKind,
    all_kinds_and_peft,
    check_ten_steps,
    copy_to_peft,
    factor_pairs,
    inputs,
    ours_and_peft,
    ours_as_peft,
    peft_factors,
    relative_error,
    tiny,
    with_peft,
)

_TARGETS = {"bert": ["query", "value"], "albert": ["query", "value"], "vit": ["q_proj", "fc1"]}


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.float().pow(2).mean()


_PARITY_CASES = [
    # The quick set leaves out families that tests.test_trained_parameters compares with PEFT.
    *(pytest.param(f, {}, marks=[pytest.mark.slow] * (f in ("gemma2", "qwen3", "phi3"))) for f in FAMILIES),
    ("llama", {"rslora": True}),
    ("llama", {"dora": True}),
    ("gpt2", {"dora": True}),
    ("bert", {"dora": True, "rslora": True}),
]


@pytest.mark.parametrize(("family", "variant"), _PARITY_CASES)
def test_outputs_gradients_and_ten_steps_match_peft(family, variant):
    targets = _TARGETS.get(family, "all-linear")
    ours, theirs = ours_and_peft(tiny(family), LoRAConfig(rank=4, alpha=8, target_modules=targets, **variant))
    batch = inputs(family)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        _loss(model, batch).backward()
    for name, factor, their_factor in factor_pairs(ours, theirs):
        difference = (ours_as_peft(factor.grad) - their_factor.grad).norm()
        assert difference <= 1e-4 * max(float(their_factor.grad.norm()), 1e-6), name
    check_ten_steps(ours, theirs, lambda model: _loss(model, batch))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_weight_changing_init_and_ten_steps_match_peft(init):
    base = tiny("llama")
    theirs = with_peft(base, init_lora_weights=init, r=4, lora_alpha=8, target_modules="all-linear").eval()
    attach(ours := copy.deepcopy(base), LoRAConfig(rank=4, alpha=8, init=init))
    with torch.no_grad():
        for name, (their_A, their_B) in peft_factors(theirs).items():
            layer = ours.get_submodule(name)
            base_layer = theirs.base_model.model.get_submodule(name).base_layer
            assert relative_error(layer.lora_A @ layer.lora_B, (their_B @ their_A).t()) <= 1e-4, name
            if init == "olora":  # PiSSA's signs are free
                torch.testing.assert_close(layer.lora_A.t(), their_A)
            assert relative_error(base_layer.weight, layer.weight) <= 1e-4
            base_layer.weight.copy_(layer.weight)
    # Singular vectors of close singular values depend on the last bit of W, so both train from the same factors.
    copy_to_peft(ours, theirs)
    batch = inputs("llama")
    check_ten_steps(ours, theirs, lambda model: _loss(model, batch))
    assert relative_error(ours(**batch).logits, theirs(**batch).logits) <= 1e-5


def test_all_layer_kinds_match_peft_for_ten_steps():
    ours, theirs, ids = all_kinds_and_peft()
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-5, rtol=1e-5)
    check_ten_steps(ours, theirs, lambda model: model(ids).pow(2).mean(), 1e-2)


_INITIAL_FACTORS = [("llama", "uniform"), ("gpt2", "gaussian"), ("vit", "uniform"), ("vit", "gaussian")]
_INITIAL_FACTORS += [("llama", "orthogonal"), ("every kind", "uniform")]


@pytest.mark.parametrize(("kind", "init"), _INITIAL_FACTORS)
def test_initial_factors_match_peft_for_equal_seeds(kind, init):
    torch.manual_seed(0)
    base = EveryKind() if kind == "every kind" else tiny(kind)
    targets = [*KINDS, "grouped"] if kind == "every kind" else _TARGETS.get(kind, "all-linear")
    torch.manual_seed(11)
    theirs = with_peft(base, r=4, target_modules=targets, init_lora_weights=True if init == "uniform" else init)
    torch.manual_seed(11)
    attach(base, LoRAConfig(rank=4, target_modules=targets, init=init))
    for name, factor, their_factor in factor_pairs(base, theirs):
        if name != "embed":  # PEFT initializes its factors differently
            rounded = {"rtol": 1e-5, "atol": 1e-7} if init == "orthogonal" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(ours_as_peft(factor), their_factor, **rounded)


def test_attach_seed_equals_torch_seed():
    first = tiny("llama")
    second = tiny("llama")
    torch.manual_seed(3)
    attach(first, LoRAConfig(rank=4))
    attach(second, LoRAConfig(rank=4), seed=3)
    for (_, a), (_, b) in zip(adapter_parameters(first), adapter_parameters(second), strict=True):
        assert torch.equal(a, b)
