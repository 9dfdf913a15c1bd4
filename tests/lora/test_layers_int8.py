"""Layers with int8-quantized weights: ``Conv1D`` matches the linear layer, adapters, and rejected settings."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltaw.errors import UserError
from deltaw.lora import LoRAConfig, attach, load_adapter, merge, save_adapter, unmerge
from deltaw.lora.attachment import adapted_layers
from deltaw.lora.kinds import is_conv1d, refusal
from deltaw.lora.layers import LoRAConv1D, LoRALinear
from deltaw.lora.layers_quantized import Int8Conv1D, Int8Linear
from deltaw.runtime.quantized_weights import quantize_int8
from tests.lora.models import inputs, randomise, tiny


def pair(columns: bool = False) -> tuple[Int8Conv1D, Int8Linear]:
    """Create an int8 ``Conv1D`` and the int8 linear layer of the transposed weight."""
    torch.manual_seed(0)
    conv = Conv1D(24, 36)
    nn.init.normal_(conv.bias)
    linear = nn.Linear(36, 24)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    by = torch.rand(36) + 0.5 if columns else None
    return Int8Conv1D.from_conv1d(conv, by), Int8Linear.from_linear(linear, by)


def adapted_pair(columns: bool) -> tuple[LoRAConv1D, LoRALinear]:
    conv, linear = pair(columns)
    layers = LoRAConv1D.from_conv1d(conv, 4, 8.0), LoRALinear.from_linear(linear, 4, 8.0)
    generator = torch.Generator().manual_seed(1)
    for name in ("lora_A", "lora_B"):
        first, second = (getattr(layer, name).data for layer in layers)
        second.copy_(first.normal_(generator=generator))
    return layers


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_int8_conv1d_matches_linear_of_transposed_weight(adapter, columns):
    layers = adapted_pair(columns) if adapter else pair(columns)
    x = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(2))
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        trained = [p for p in layer.parameters() if p.requires_grad]
        assert len(trained) == (2 if adapter else 0)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *trained])])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    assert results[0][0].shape == (2, 5, 24)


def test_int8_conv1d_error_is_within_rounding():
    torch.manual_seed(0)
    conv = Conv1D(24, 36)
    weight = conv.weight.detach().clone()
    layer = Int8Conv1D.from_conv1d(conv, torch.rand(36) + 0.5)
    assert layer.weight.shape == (24, 36) and layer.weight.dtype == torch.int8
    assert layer.bias is conv.bias and (layer.nf, layer.nx) == (24, 36)
    error = (layer.plain_weight() - weight).abs()
    assert 0 < float(error.max()) <= float(layer.weight_scale.max()) * 1.5 / 2 * 1.01
    x = torch.randn(7, 36)
    assert float((layer(x) - conv(x)).norm() / (conv(x) - conv.bias).norm()) < 0.02
    assert is_conv1d(layer) and refusal(layer) is None and "nf=24" in repr(layer)


def quantized_model(family: str) -> nn.Module:
    model = tiny(family)
    batch = inputs(family)
    report = quantize_int8(model.base_model, lambda: model(**batch))
    assert report.layers and not report.unquantized, str(report)
    return model


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}], ids=["", "lora_bias"])
def test_adapter_file_is_identical_with_int8_base_and_merges_into_plain_base(family, settings, tmp_path):
    targets = ["c_attn", "c_proj", "c_fc"] if family == "gpt2" else ["q_proj", "up_proj"]
    config = LoRAConfig(rank=4, alpha=8, target_modules=targets, **settings)
    plain = tiny(family)
    int8 = quantized_model(family)
    untouched = copy.deepcopy(plain)
    for name, model in (("plain", plain), ("int8", int8)):
        attach(model, config, seed=3)
        randomise(model)
        save_adapter(model, tmp_path / name)
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "int8")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    texts = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("plain", "int8")]
    assert texts[0]["fan_in_fan_out"] is texts[1]["fan_in_fan_out"] is (family == "gpt2")

    batch = inputs(family)
    expected = plain(**batch).logits
    close = {"rtol": 1e-4, "atol": 1e-4}
    ours = copy.deepcopy(untouched)
    load_adapter(ours, tmp_path / "int8")
    torch.testing.assert_close(ours(**batch).logits, expected, **close)
    if not settings or family == "gpt2":
        merge(ours)
        torch.testing.assert_close(ours(**batch).logits, expected, **close)
        unmerge(ours)
    theirs = PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "int8")
    torch.testing.assert_close(theirs(**batch).logits, expected, **close)
    assert 0 < float((int8(**batch).logits - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize(("family", "target"), [("gpt2", "c_attn"), ("llama", "q_proj")])
def test_settings_that_need_exact_weights_raise_before_changes(family, target):
    model = quantized_model(family)
    for settings in ({"dora": True}, {"init": "pissa"}, {"init": "olora"}):
        with pytest.raises(UserError, match="int8-quantized"):
            attach(model, LoRAConfig(rank=4, target_modules=[target], **settings))
        assert any(isinstance(m, Int8Conv1D | Int8Linear) for m in model.modules())
        assert not any(isinstance(m, LoRALinear | LoRAConv1D) for m in model.modules())
    attach(model, LoRAConfig(rank=4, target_modules="all-linear"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="int8-quantized"):
        merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer.merged for _, layer in adapted_layers(model))
