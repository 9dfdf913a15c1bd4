"""The same factors in PEFT 0.21 and here: outputs, gradients, training steps, starts."""

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
    copy_to_peft,
    every_kind_and_pefts,
    factor_pairs,
    inputs,
    ours_and_pefts,
    ours_as_peft,
    peft_factors,
    relative,
    ten_steps,
    tiny,
    with_peft,
)

_TARGETS = {"bert": ["query", "value"], "albert": ["query", "value"], "vit": ["q_proj", "fc1"]}


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.float().pow(2).mean()


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"rslora": True}),
        ("llama", {"dora": True}),
        ("gpt2", {"dora": True}),
        ("bert", {"dora": True, "rslora": True}),
    ],
)
def test_outputs_gradients_and_ten_steps_equal_pefts(family, variant):
    targets = _TARGETS.get(family, "all-linear")
    ours, theirs = ours_and_pefts(tiny(family), LoRAConfig(rank=4, alpha=8, target_modules=targets, **variant))
    batch = inputs(family)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        _loss(model, batch).backward()
    for name, mine, other in factor_pairs(ours, theirs):
        difference = (ours_as_peft(mine.grad) - other.grad).norm()
        assert difference <= 1e-4 * max(float(other.grad.norm()), 1e-6), name
    ten_steps(ours, theirs, lambda model: _loss(model, batch))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_weights_is_pefts_and_so_are_ten_steps_from_there(init):
    base = tiny("llama")
    theirs = with_peft(base, init_lora_weights=init, r=4, lora_alpha=8, target_modules="all-linear").eval()
    attach(ours := copy.deepcopy(base), LoRAConfig(rank=4, alpha=8, init=init))
    with torch.no_grad():
        for name, (their_A, their_B) in peft_factors(theirs).items():
            layer, base_layer = ours.get_submodule(name), theirs.base_model.model.get_submodule(name).base_layer
            assert relative(layer.lora_A @ layer.lora_B, (their_B @ their_A).t()) <= 1e-4, name
            if init == "olora":  # PiSSA's signs are free
                torch.testing.assert_close(layer.lora_A.t(), their_A)
            assert relative(base_layer.weight, layer.weight) <= 1e-4
            base_layer.weight.copy_(layer.weight)
    # Singular vectors close to each other turn with the last bit of W: from the same factors on, then.
    copy_to_peft(ours, theirs)
    batch = inputs("llama")
    ten_steps(ours, theirs, lambda model: _loss(model, batch))
    assert relative(ours(**batch).logits, theirs(**batch).logits) <= 1e-5


def test_every_kind_of_layer_equals_pefts_through_ten_steps():
    ours, theirs, ids = every_kind_and_pefts()
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-5, rtol=1e-5)
    ten_steps(ours, theirs, lambda model: model(ids).pow(2).mean(), 1e-2)


@pytest.mark.parametrize(
    ("of", "init"),
    [
        ("llama", "uniform"),
        ("gpt2", "gaussian"),
        ("vit", "uniform"),
        ("vit", "gaussian"),
        ("llama", "orthogonal"),
        ("every kind", "uniform"),
    ],
)
def test_one_seed_starts_the_factors_as_pefts(of, init):
    torch.manual_seed(0)
    base = EveryKind() if of == "every kind" else tiny(of)
    targets = [*KINDS, "grouped"] if of == "every kind" else _TARGETS.get(of, "all-linear")
    torch.manual_seed(11)
    theirs = with_peft(base, r=4, target_modules=targets, init_lora_weights=True if init == "uniform" else init)
    torch.manual_seed(11)
    attach(base, LoRAConfig(rank=4, target_modules=targets, init=init))
    for name, mine, other in factor_pairs(base, theirs):
        if name != "embed":  # whose factors PEFT draws otherwise
            rounded = {"rtol": 1e-5, "atol": 1e-7} if init == "orthogonal" else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(ours_as_peft(mine), other, **rounded)


def test_the_seed_of_attach_is_torchs_seed():
    first, second = tiny("llama"), tiny("llama")
    torch.manual_seed(3)
    attach(first, LoRAConfig(rank=4))
    attach(second, LoRAConfig(rank=4), seed=3)
    for (_, a), (_, b) in zip(adapter_parameters(first), adapter_parameters(second), strict=True):
        assert torch.equal(a, b)
