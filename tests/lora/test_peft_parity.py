"""The same factors in PEFT 0.21 and here: outputs, gradients, training steps, starts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deltaw.lora import LoRAConfig, LoRALayer, adapter_parameters, attach
from tests.lora.models import (
    FAMILIES,
    KINDS,
    EveryKind,
    copy_to_peft,
    every_kind_and_pefts,
    inputs,
    ours_as_peft,
    peft_factors,
    randomise,
    relative,
    ten_steps,
    tiny,
    with_peft,
)


def _loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits.float().pow(2).mean()


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *((family, {}) for family in FAMILIES),
        ("llama", {"rslora": True}),
        ("gpt2", {"rslora": True}),
        ("llama", {"dora": True}),
        ("gpt2", {"dora": True}),
        ("bert", {"dora": True, "rslora": True}),
    ],
)
def test_outputs_gradients_and_ten_steps_equal_pefts(family, variant):
    base = tiny(family)
    targets = "all-linear" if family not in ("bert", "albert", "vit") else ["query", "value", "q_proj", "v_proj"]
    if family in ("bert", "albert"):
        targets = ["query", "value"]
    if family == "vit":
        targets = ["q_proj", "fc1"]
    settings = {f"use_{name}": value for name, value in variant.items()}
    theirs = with_peft(base, r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.0, **settings).eval()
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(rank=4, alpha=8, target_modules=targets, **variant))
    randomise(ours)
    copy_to_peft(ours, theirs)
    batch = inputs(family)
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)

    _loss(ours, batch).backward()
    _loss(theirs, batch).backward()
    reference = peft_factors(theirs)
    layers = {name: m for name, m in ours.named_modules() if isinstance(m, LoRALayer)}
    for name, layer in layers.items():
        for factor, other in zip((layer.lora_A, layer.lora_B), reference[name], strict=True):
            scale = max(float(other.grad.norm()), 1e-6)
            assert float((ours_as_peft(factor.grad) - other.grad).norm()) <= 1e-4 * scale, name

    ours.zero_grad()
    theirs.zero_grad()
    ten_steps(ours, theirs, lambda model: _loss(model, batch))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_ten_steps_from_a_start_that_changes_weights_equal_pefts(init):
    base = tiny("llama")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    theirs = with_peft(base, init_lora_weights=init, **settings).eval()
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(rank=4, alpha=8, init=init))
    # Singular vectors close to each other turn with the last bit of W: from the same factors on, then.
    copy_to_peft(ours, theirs)
    with torch.no_grad():
        for name in peft_factors(theirs):
            base_layer = theirs.base_model.model.get_submodule(name).base_layer
            assert relative(base_layer.weight, ours.get_submodule(name).weight) <= 1e-4
            base_layer.weight.copy_(ours.get_submodule(name).weight)
    batch = inputs("llama")
    ten_steps(ours, theirs, lambda model: _loss(model, batch))
    assert relative(ours(**batch).logits, theirs(**batch).logits) <= 1e-5


def test_every_kind_of_layer_equals_pefts_through_ten_steps():
    ours, theirs, ids = every_kind_and_pefts()
    torch.testing.assert_close(ours(ids), theirs(ids), atol=1e-5, rtol=1e-5)
    ten_steps(ours, theirs, lambda model: model(ids).pow(2).mean(), 1e-2)


def test_gradient_of_the_input_equals_pefts():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    theirs = with_peft(base, r=4, lora_alpha=8, target_modules=["0"])
    ours = copy.deepcopy(base)
    attach(ours, LoRAConfig(rank=4, alpha=8, target_modules=["0"]))
    randomise(ours)
    copy_to_peft(ours, theirs)
    x = torch.randn(3, 5, 8, requires_grad=True)
    grads = [torch.autograd.grad(model(x).pow(2).sum(), x)[0] for model in (ours, theirs)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ours_init", "their_init"), [("uniform", True), ("gaussian", "gaussian")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_one_seed_starts_the_factors_as_pefts(family, ours_init, their_init):
    base = tiny(family)
    targets = ["q_proj", "fc1"] if family == "vit" else "all-linear"
    torch.manual_seed(11)
    theirs = with_peft(base, r=4, target_modules=targets, init_lora_weights=their_init)
    torch.manual_seed(11)
    attach(base, LoRAConfig(rank=4, target_modules=targets, init=ours_init))
    for name, (their_A, their_B) in peft_factors(theirs).items():
        layer = base.get_submodule(name)
        assert torch.equal(layer.lora_A.t(), their_A) and torch.equal(layer.lora_B.t(), their_B)


def test_the_seed_of_attach_is_torchs_seed():
    first, second = tiny("llama"), tiny("llama")
    torch.manual_seed(3)
    attach(first, LoRAConfig(rank=4))
    attach(second, LoRAConfig(rank=4), seed=3)
    for (_, a), (_, b) in zip(adapter_parameters(first), adapter_parameters(second), strict=True):
        assert torch.equal(a, b)


def test_layers_after_convolutions_and_embeddings_start_as_pefts_too():
    torch.manual_seed(0)
    base, names = EveryKind(), [*KINDS, "grouped"]
    torch.manual_seed(4)
    theirs = with_peft(base, r=4, target_modules=names)
    torch.manual_seed(4)
    attach(base, LoRAConfig(rank=4, target_modules=names))
    for name, (their_A, _) in peft_factors(theirs).items():
        if name != "embed":
            assert torch.equal(ours_as_peft(base.get_submodule(name).lora_A), their_A), name


def test_an_orthogonal_start_is_pefts_and_leaves_the_outputs():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    x = torch.randn(4, 8)
    expected = base(x)
    torch.manual_seed(2)
    theirs = with_peft(base, r=4, target_modules=["0"], init_lora_weights="orthogonal")
    torch.manual_seed(2)
    attach(base, LoRAConfig(rank=4, target_modules=["0"], init="orthogonal"))
    their_A, their_B = peft_factors(theirs)["0"]
    assert torch.equal(base[0].lora_A.t(), their_A) and torch.equal(base[0].lora_B.t(), their_B)
    torch.testing.assert_close(base(x), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changes_weights_is_pefts(init):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    theirs = with_peft(base, r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=init)
    attach(base, LoRAConfig(rank=4, alpha=8, target_modules=["0"], init=init))
    their_A, their_B = peft_factors(theirs)["0"]
    near = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(base[0].lora_A @ base[0].lora_B, (their_B @ their_A).t(), **near)
    if init == "olora":  # PiSSA's signs are free
        torch.testing.assert_close(base[0].lora_A.t(), their_A)
    torch.testing.assert_close(base[0].weight, theirs.base_model.model[0].base_layer.weight, **near)
