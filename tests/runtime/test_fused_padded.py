"""Fused blocks over padded rows, for encoders and for decoders that cannot run packed rows."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from deltaw.kernels import loader
from deltaw.lora import adapter_parameters
from deltaw.memory.simulation import fake_tensors
from deltaw.runtime.packing_checks import can_pack
from deltaw.runtime.padded import fused_padded_blocks, padded_rows
from deltaw.runtime.quantized_weights import quantize_int8
from tests.runtime.families import (
    ENCODERS,
    FALCON,
    VOCABULARY,
    BlockResult,
    assert_as_accurate,
    assert_near,
    attach_adapter,
    checkpoint_blocks,
    encoder_of,
    layers_of,
    model_of,
    relative_error,
)
from tests.runtime.test_fused import assert_same_in_one_call, count_runs, record_calls

pytestmark = pytest.mark.skipif(loader.library() is None, reason=loader.unavailable_reason() or "")
LENGTHS = ([13, 4, 9, 1], [13, 13, 13, 13])


def make_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return encoder_of(family, dtype) if family in ENCODERS else model_of(family, dtype)


def inputs_of(model: nn.Module, lengths: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return inputs of a backbone and a mask of outputs that belong to tokens."""
    generator = torch.Generator().manual_seed(1)
    if model.base_model.main_input_name == "pixel_values":
        pixels = torch.randn(len(lengths), 3, 16, 16, generator=generator)
        return {"pixel_values": pixels.to(model.dtype)}, torch.ones(len(lengths), 17, dtype=torch.bool)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, VOCABULARY, real.shape, generator=generator)
    inputs = {"input_ids": tokens * real, "attention_mask": real.long()}
    return inputs if model.base_model is model else {**inputs, "use_cache": False}, real


def outputs_and_gradients(model: nn.Module, lengths: list[int], fused: bool) -> BlockResult:
    inputs, real = inputs_of(model, lengths)
    factors = [factor for _, factor in adapter_parameters(model)]
    with padded_rows(model, fused=fused):
        out = model.base_model(**inputs)[0]
        output_weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) * real[..., None]
        grads = torch.autograd.grad((out.float() * output_weights).sum(), factors)
    return out.detach()[real], list(grads)


@pytest.mark.each_pair
@pytest.mark.parametrize("lengths", LENGTHS, ids=["padded", "equal"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*ENCODERS, *FALCON, "Llama", "GPT2", "GPTNeoX"])
def test_fused_blocks_match_model_code(family, checkpointing, lengths, monkeypatch):
    model = attach_adapter(make_model(family))
    expected = outputs_and_gradients(model, lengths, fused=False)
    if checkpointing:
        checkpoint_blocks(model)
    assert fused_padded_blocks(model).choice.value, fused_padded_blocks(model).choice.why
    runs = count_runs(monkeypatch)
    with record_calls(monkeypatch) as calls:
        assert_near(outputs_and_gradients(model, lengths, fused=True), expected)
    assert len(runs) == len(layers_of(model)) * (1 + checkpointing) == calls.count("forward")
    assert all("forward" not in vars(block) for block in layers_of(model))


@pytest.mark.parametrize("family", [*ENCODERS, *FALCON])
def test_bf16_error_of_fused_blocks_is_no_larger_than_model_code(family):
    samples = []
    for seed in range(3):
        model, exact = (attach_adapter(make_model(family, dtype), seed) for dtype in (torch.bfloat16, torch.float32))
        cases = ((model, True), (model, False), (exact, False))
        samples.append(tuple(outputs_and_gradients(candidate, LENGTHS[0], fused=fused) for candidate, fused in cases))
    assert_as_accurate(samples)


@pytest.mark.parametrize(
    "family", ["Bert", *(pytest.param(f, marks=pytest.mark.slow) for f in (*ENCODERS[1:], *FALCON))]
)
def test_recognition_on_fake_tensors_matches_real_run(family):
    expected = fused_padded_blocks(make_model(family, torch.bfloat16))
    with fake_tensors():
        actual = fused_padded_blocks(make_model(family, torch.bfloat16))
    assert actual.choice.value == expected.choice.value is True
    assert [b.roles for b in actual.blocks] == [b.roles for b in expected.blocks]


def test_alibi_attention_runs_model_code(monkeypatch):
    assert not can_pack(model_of("Falcon")).value
    model = attach_adapter(model_of("Falcon", alibi=True))
    runs = count_runs(monkeypatch)
    expected, _ = outputs_and_gradients(model, LENGTHS[0], fused=False)
    out, _ = outputs_and_gradients(model, LENGTHS[0], fused=True)
    assert not runs and relative_error(out, expected) < 1e-6  # norms and MLPs run fused
    assert not fused_padded_blocks(model).choice.value


@pytest.mark.parametrize("trained", ["output.LayerNorm", "intermediate", "attention.self.value"])
def test_fully_trained_modules_in_block_get_gradients(trained):
    model = encoder_of("Bert")
    assert fused_padded_blocks(model).choice.value
    attach_adapter(model, target_modules=["key"], train_modules=[trained])
    expected = outputs_and_gradients(model, LENGTHS[0], fused=False)
    assert_near(outputs_and_gradients(model, LENGTHS[0], fused=True), expected)


@pytest.mark.each_pair
@pytest.mark.parametrize("lengths", [LENGTHS[0], [500, 3, 480]], ids=["few rows", "many rows"])
@pytest.mark.parametrize("int8", ["", "int8", "int8 in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*ENCODERS, *FALCON, "GPT2"])
def test_block_in_one_call_is_bit_identical(family, dtype, int8, lengths, monkeypatch):
    model = make_model(family, dtype)
    if int8:
        inputs, _ = inputs_of(model, LENGTHS[0])
        max_ratio = math.inf if "in blocks" in int8 else 0.0
        monkeypatch.setattr("deltaw.runtime.quantized_weights.MAX_BLOCK_ERROR_RATIO", max_ratio)
        assert quantize_int8(model.base_model, lambda: model.base_model(**inputs)).layers
    attach_adapter(model)
    expected, _ = outputs_and_gradients(model, lengths, fused=False)
    assert fused_padded_blocks(model).choice.value  # recognition also makes calls
    blocks = len(layers_of(model))
    run_fused = functools.partial(outputs_and_gradients, model, lengths, fused=True)
    out, _ = assert_same_in_one_call(run_fused, monkeypatch, blocks, blocks)
    assert relative_error(out, expected) < 0.05
