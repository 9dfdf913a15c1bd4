"""The fingerprint of a base model covers every value, in every dtype and memory layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaw.lora import LoRAConfig, OtherBaseModelWarning, attach, load_adapter, save_adapter
from deltaw.lora import fingerprint as module
from deltaw.lora.fingerprint import base_fingerprint, digest_pieces, digest_tensor, same_base
from tests.tiny_models import causal_model


class Mixed(nn.Module):
    """Layers with a saved buffer, a buffer that is not saved, a scalar, and weights that are views."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.transposed = nn.Linear(5, 4)
        self.transposed.weight = nn.Parameter(torch.randn(5, 4).t())
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("frequencies", torch.randn(4), persistent=False)


def change_value(tensor: torch.Tensor, position: int) -> None:
    """Replace one value of a tensor by the next representable number."""
    with torch.no_grad():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(position), tensor.shape))
        tensor[index] = torch.nextafter(tensor[index], tensor[index] + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_fingerprint_depends_on_every_value(dtype, monkeypatch):
    monkeypatch.setattr(module, "HASH_CHUNK", 7)
    monkeypatch.setattr(module, "COPY_CHUNK", 11)
    model = Mixed().to(dtype)
    original = base_fingerprint(model)
    tensors = dict(module.saved_tensors(model))
    assert {"norm.running_mean", "norm.running_var", "scale", "transposed.weight"} < set(tensors)
    for name, tensor in tensors.items():
        before = tensor.detach().clone()
        for position in range(tensor.numel()):
            change_value(tensor, position)
            fingerprint = base_fingerprint(model)
            assert fingerprint != original and same_base(fingerprint, original) is False, (name, position)
            tensor.data.copy_(before)
    model.frequencies.add_(1)
    assert base_fingerprint(model) == original


def test_digest_covers_last_value_for_any_chunking():
    values = torch.randn(module.HASH_CHUNK + 1)
    original = digest_tensor(values)
    assert original == digest_pieces(values.shape, [values[:3], values[3:]])
    values[-1] += 1
    assert digest_tensor(values) != original


def test_fingerprint_depends_on_names_and_shapes():
    layer = nn.Linear(2, 8, bias=False)
    reshaped = nn.Linear(4, 4, bias=False)
    reshaped.weight.data = layer.weight.data.view(4, 4)
    assert base_fingerprint(layer) != base_fingerprint(reshaped)
    assert base_fingerprint(nn.ModuleDict({"a": layer})) != base_fingerprint(nn.ModuleDict({"b": layer}))


def test_digest_rounds_as_torch():
    numbers = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32).view(torch.float32)
    ties = (torch.randint(0, 2**14, (1000,), dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    for values in (numbers[numbers.isfinite()], ties):
        in_fp32 = digest_tensor(values)
        in_bf16 = digest_tensor(values.bfloat16())
        assert in_fp32.digests[:1] == in_bf16.digests and len(in_fp32.digests) == 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_bf16_model_matches_and_changed_model_does_not(family):
    exact = causal_model(family)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    widened = copy.deepcopy(rounded).float()
    assert same_base(base_fingerprint(widened), base_fingerprint(rounded)) is True
    assert same_base(base_fingerprint(exact), base_fingerprint(rounded)) is True
    assert same_base(base_fingerprint(exact.double()), base_fingerprint(rounded)) is True
    halves = copy.deepcopy(widened)
    halves.get_output_embeddings().to(torch.bfloat16)
    assert same_base(base_fingerprint(halves), base_fingerprint(widened)) is True
    modified = copy.deepcopy(widened)
    change_value(next(modified.parameters()), 5)
    assert same_base(base_fingerprint(modified), base_fingerprint(widened)) is False
    change_value(next(rounded.parameters()), 5)
    assert same_base(base_fingerprint(exact), base_fingerprint(rounded)) is False


def test_bf16_model_with_tensors_kept_in_fp32_matches():
    exact = causal_model("llama")
    mixed = copy.deepcopy(exact).to(torch.bfloat16)
    mixed.model.norm.weight.data = exact.model.norm.weight.data.clone().add_(2.0**-12)
    exact.model.norm.weight.data.copy_(mixed.model.norm.weight)
    assert same_base(base_fingerprint(exact), base_fingerprint(mixed)) is True
    change_value(mixed.model.embed_tokens.weight, 3)
    assert same_base(base_fingerprint(exact), base_fingerprint(mixed)) is False


@pytest.mark.parametrize("added", [0.0, 2.0**-12, 2.0**-40])
def test_model_matches_itself_in_every_precision(added):
    exact = nn.ParameterDict({"scale": nn.Parameter(torch.tensor([1.0 + added], dtype=torch.float64))})
    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    fingerprints = [base_fingerprint(copy.deepcopy(exact).to(dtype)) for dtype in dtypes]
    assert all(same_base(first, second) for first in fingerprints for second in fingerprints)
    plain = nn.ParameterDict({"scale": nn.Parameter(torch.ones(1, dtype=torch.float64))})
    assert same_base(base_fingerprint(plain), fingerprints[0]) is (added == 0.0)


def test_replaced_parameters_contribute_only_their_shape():
    model = causal_model("llama")
    original = base_fingerprint(model, [model.lm_head.weight])
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert base_fingerprint(model, [model.lm_head.weight]) == original
    model.lm_head.weight = nn.Parameter(torch.zeros(7, 32))
    assert base_fingerprint(model, [model.lm_head.weight]) != original


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    """Return a function that saves an adapter, optionally with a given base model fingerprint."""

    def save(*fingerprint: str | None) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            if fingerprint:
                patch.setattr("deltaw.lora.adapt.base_fingerprint", lambda *arguments: fingerprint[0])
            model = causal_model("llama")
            attach(model, LoRAConfig(rank=2), seed=0)
            save_adapter(model, tmp_path)
        return tmp_path

    return save


def test_loading_adapter_onto_changed_model_warns(saved):
    folder = saved()
    for position in (0, 17, -1):
        modified = causal_model("llama")
        weight = modified.model.layers[1].mlp.down_proj.weight
        change_value(weight, position % weight.numel())
        with pytest.warns(OtherBaseModelWarning, match="another base model"):
            load_adapter(modified, folder)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("fingerprint", [(), (None,)])
def test_no_warning_for_other_precision_or_without_fingerprint(fingerprint, saved):
    load_adapter(causal_model("llama").to(torch.bfloat16), saved(*fingerprint))
