"""The fingerprint of a base model covers every value, in whatever type and layout it lies in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaw.lora import LoRAConfig, OtherBaseModelWarning, attach, load_adapter, save_adapter
from deltaw.lora import fingerprint as module
from deltaw.lora.fingerprint import base_fingerprint, same_base, values_in_memory, values_of
from tests.tiny_models import causal_model


class Mixed(nn.Module):
    """Layers with a buffer that is learned, one that is not saved, a scalar, and weights that are views."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.transposed = nn.Linear(5, 4)
        self.transposed.weight = nn.Parameter(torch.randn(5, 4).t())
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("frequencies", torch.randn(4), persistent=False)


def changed(tensor: torch.Tensor, place: int) -> None:
    """Move one value of a tensor to the next number of its type."""
    with torch.no_grad():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))
        tensor[index] = torch.nextafter(tensor[index], tensor[index] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_single_value_of_any_tensor_counts(dtype, monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 7)
    monkeypatch.setattr(module, "COPIED_AT_ONCE", 11)
    model = Mixed().to(dtype)
    own = base_fingerprint(model)
    tensors = dict(module.saved_tensors(model))
    assert {"norm.running_mean", "norm.running_var", "scale", "transposed.weight"} < set(tensors)
    for name, tensor in tensors.items():
        before = tensor.detach().clone()
        for place in range(tensor.numel()):
            changed(tensor, place)
            found = base_fingerprint(model)
            assert found != own and same_base(found, own) is False, (name, place)
            tensor.data.copy_(before)
    model.frequencies.add_(1)
    assert base_fingerprint(model) == own


def test_the_last_of_many_values_counts_wherever_pieces_end():
    values = torch.randn(module.AT_ONCE + 1)
    own = values_in_memory(values)
    assert own == values_of(values.shape, [values[:3], values[3:]])
    values[-1] += 1
    assert values_in_memory(values) != own


def test_names_and_shapes_count():
    layer = nn.Linear(2, 8, bias=False)
    other = nn.Linear(4, 4, bias=False)
    other.weight.data = layer.weight.data.view(4, 4)
    assert base_fingerprint(layer) != base_fingerprint(other)
    assert base_fingerprint(nn.ModuleDict({"a": layer})) != base_fingerprint(nn.ModuleDict({"b": layer}))


def test_numbers_are_rounded_as_torch_rounds_them():
    numbers = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32).view(torch.float32)
    ties = (torch.randint(0, 2**14, (1000,), dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    for values in (numbers[numbers.isfinite()], ties):
        in_fp32, in_bf16 = values_in_memory(values), values_in_memory(values.bfloat16())
        assert in_fp32.digests[:1] == in_bf16.digests and len(in_fp32.digests) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_a_model_rounded_to_bf16_is_the_same_and_one_rounded_elsewhere_is_not(family):
    exact = causal_model(family)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    widened = copy.deepcopy(rounded).float()
    assert same_base(base_fingerprint(widened), base_fingerprint(rounded)) is True
    assert same_base(base_fingerprint(exact), base_fingerprint(rounded)) is True
    assert same_base(base_fingerprint(exact.double()), base_fingerprint(rounded)) is True
    halves = copy.deepcopy(widened)
    halves.get_output_embeddings().to(torch.bfloat16)
    assert same_base(base_fingerprint(halves), base_fingerprint(widened)) is True
    again = copy.deepcopy(widened)
    changed(next(again.parameters()), 5)
    assert same_base(base_fingerprint(again), base_fingerprint(widened)) is False
    changed(next(rounded.parameters()), 5)
    assert same_base(base_fingerprint(exact), base_fingerprint(rounded)) is False


@pytest.mark.parametrize("added", [0.0, 2.0**-12, 2.0**-40])
def test_each_type_adds_what_the_one_before_cannot_hold(added):
    exact = nn.ParameterDict({"scale": nn.Parameter(torch.tensor([1.0 + added], dtype=torch.float64))})
    found = [base_fingerprint(copy.deepcopy(exact).to(d)) for d in (torch.float64, torch.float32, torch.bfloat16)]
    assert all(same_base(one, other) for one in found for other in found)
    plain = nn.ParameterDict({"scale": nn.Parameter(torch.ones(1, dtype=torch.float64))})
    assert same_base(base_fingerprint(plain), found[0]) is (added == 0.0)


def test_replaced_parameters_count_with_their_shape_alone():
    model = causal_model("llama")
    own = base_fingerprint(model, [model.lm_head.weight])
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert base_fingerprint(model, [model.lm_head.weight]) == own
    model.lm_head.weight = nn.Parameter(torch.zeros(7, 32))
    assert base_fingerprint(model, [model.lm_head.weight]) != own


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """Saves an adapter, whose base model has another fingerprint where one is given."""

    def save(*fingerprint: str | None) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            if fingerprint:
                patch.setattr("deltaw.lora.adapt.base_fingerprint", lambda *of: fingerprint[0])
            model = causal_model("llama")
            attach(model, LoRAConfig(rank=2), seed=0)
            save_adapter(model, tmp_path)
        return tmp_path

    return save


def test_a_swapped_value_is_noticed_when_an_adapter_is_loaded(saved):
    folder = saved()
    for place in (0, 17, -1):
        other = causal_model("llama")
        weight = other.model.layers[1].mlp.down_proj.weight
        changed(weight, place % weight.numel())
        with pytest.warns(OtherBaseModelWarning, match="another base model"):
            load_adapter(other, folder)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("fingerprint", [(), (None,)])
def test_nothing_is_said_of_the_same_model_in_another_precision_or_without_a_fingerprint(fingerprint, saved):
    load_adapter(causal_model("llama").to(torch.bfloat16), saved(*fingerprint))
