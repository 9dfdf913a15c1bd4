"""Layers of bitsandbytes compute with their dequantized weights, on its CPU kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from deltaw.hub.loading import load
from deltaw.lora import LoRAConfig, attach
from deltaw.lora.fingerprint import base_fingerprint
from deltaw.lora.layers import LoRAForeignLinear
from deltaw.lora.layers_quantized import quantize_linear_nf4
from deltaw.lora.stored import count_logical_parameters
from deltaw.machine import choices
from deltaw.runtime.nf4 import bitsandbytes_linear, quantize_nf4, quantize_with_bitsandbytes
from deltaw.training.preparation import quantize_weights
from tests.byte_models import byte_tokenizer, save_model, tiny_gpt2, tiny_llama
from tests.conftest import refusal

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'deltaw[cuda]'")
TOLERANCE = {"nf4": 1e-2, "int8": 3e-2}  # in relation to the norm; int8 also rounds the inputs


def make_linear(bias=True):
    torch.manual_seed(0)
    return nn.Linear(128, 256, bias=bias).to(torch.bfloat16).requires_grad_(False)


def dequantized(layer):
    """Return the weight of a layer of bitsandbytes in fp32."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return layer.weight.data.float() * layer.weight.SCB[:, None] / 127


def relative_error(actual, expected):
    return float(((actual.float() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_adapted_layer_equals_dequantized_layer(precision):
    layer = bitsandbytes_linear(make_linear(), precision, "cpu")
    x = torch.randn(3, 20, 128)
    weight = dequantized(layer)
    bias = layer.bias.float()
    model = nn.ModuleDict({"q_proj": layer})
    attach(model, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj"]))
    adapted = model["q_proj"]
    assert isinstance(adapted, LoRAForeignLinear) and adapted.lora_A.dtype == torch.float32
    adapted.lora_B.data.normal_(std=0.1)
    inputs = [x.to(torch.bfloat16).requires_grad_(), x.clone().to(torch.bfloat16).float().requires_grad_()]
    factors = [f.detach().clone().requires_grad_() for f in (adapted.lora_A, adapted.lora_B)]
    expected = inputs[1] @ weight.t() + bias + 2 * inputs[1] @ factors[0] @ factors[1]
    slopes = torch.randn_like(expected)
    tolerance = TOLERANCE[precision]
    expected.backward(slopes)
    y = adapted(inputs[0])
    y.backward(slopes.to(y.dtype))
    assert y.dtype == torch.bfloat16 and relative_error(y, expected.detach()) < tolerance
    assert relative_error(inputs[0].grad, inputs[1].grad) < tolerance
    for parameter, factor in zip((adapted.lora_A, adapted.lora_B), factors, strict=True):
        assert relative_error(parameter.grad, factor.grad) < tolerance


def test_nf4_values_equal_own_kernels():
    linear = make_linear()
    ours = quantize_linear_nf4(linear).plain_weight()
    theirs = dequantized(bitsandbytes_linear(linear, "nf4", "cpu"))
    assert float((ours.float() != theirs.to(torch.bfloat16).float()).float().mean()) < 0.02
    torch.testing.assert_close(ours.float(), theirs, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantized_model_keeps_fingerprint_head_and_parameter_count(precision):
    model = tiny_llama(hidden_size=64, intermediate_size=128).bfloat16().requires_grad_(False)
    model.lm_head.weight = model.model.embed_tokens.weight
    before = base_fingerprint(model)
    count = count_logical_parameters(model)
    message = quantize_with_bitsandbytes(model.base_model, precision, "cpu")
    assert message == f"14 of 14 layers are in {precision}, with bitsandbytes"
    assert base_fingerprint(model) == before and count_logical_parameters(model) == count
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    kept = quantize_with_bitsandbytes(tiny_gpt2().base_model, precision, "cpu")
    assert kept.startswith("0 of 8 layers") and "not supported: h.0.attn.c_attn" in kept


def test_stored_bytes_equal_those_of_the_plan():
    """A plan counts the tensors of deltaw's own NF4 layers."""
    models = [tiny_llama(hidden_size=256, intermediate_size=512).bfloat16() for _ in range(2)]
    quantize_nf4(models[0].base_model)
    quantize_with_bitsandbytes(models[1].base_model, "nf4", "cpu")
    tensors = [[*model.parameters(), *model.buffers()] for model in models]
    for module in models[1].modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            tensors[1] += [state.absmax, state.offset, state.state2.absmax]
    ours, theirs = (sum(tensor.nbytes for tensor in members) for members in tensors)
    assert theirs == pytest.approx(ours, rel=2e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_checkpoint_is_loaded_and_computes_in_model_precision(bits, tmp_path, monkeypatch):
    plain = save_model(tiny_llama(hidden_size=64, intermediate_size=128), tmp_path / "plain")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # computes in fp32 by default
    config = BitsAndBytesConfig(load_in_4bit=True, **options) if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(folder := tmp_path / "quantized")
    byte_tokenizer().save_pretrained(folder)

    loaded = load(str(folder), precision="bf16", device="cpu", threads=1)
    layer = loaded.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt)
    assert bits == 8 or layer.compute_dtype == torch.bfloat16
    again = load(str(folder), precision="bf16", device="cpu", threads=1)
    assert base_fingerprint(loaded.model) == base_fingerprint(again.model) is not None
    assert quantize_weights(loaded.model, "nf4", ()) == (
        ["precision nf4: the weights remain as the model's files store them"],
        [],
    )
    attach(loaded.model, LoRAConfig(rank=2, alpha=4, target_modules=["up_proj"]))
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        loaded.model(tokens)  # inference may rearrange weights for the CPU
    loss = loaded.model(tokens, labels=tokens).loss
    loss.backward()
    assert float(loaded.model.model.layers[0].mlp.up_proj.lora_B.grad.norm()) > 0

    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda name: None)
    refusal(load, str(folder), precision="bf16", device="cpu", match="the quantized model needs bitsandbytes")
