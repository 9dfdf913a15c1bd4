"""Fused blocks over padded rows: encoders, which see both ways, and decoders that cannot run packed rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deltaw.kernels import loader
from deltaw.lora import adapter_parameters
from deltaw.memory.simulation import fake_tensors
from deltaw.runtime.packed import can_pack, fused_padded_blocks, padded_rows
from deltaw.runtime.quantized_weights import quantize_int8
from tests.runtime.families import (
    ENCODERS,
    FALCON,
    VOCABULARY,
    Found,
    adapted,
    assert_as_near,
    assert_near,
    checkpoint_blocks,
    encoder_of,
    layers_of,
    model_of,
    off,
)
from tests.runtime.test_fused import assert_same_in_one_call, count_runs, counted_calls

pytestmark = pytest.mark.skipif(loader.library() is None, reason=loader.why_not() or "")
LENGTHS = ([13, 4, 9, 1], [13, 13, 13, 13])


def made(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return encoder_of(family, dtype) if family in ENCODERS else model_of(family, dtype)


def inputs_of(model: nn.Module, lengths: list[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of a backbone, and which of its outputs are of tokens."""
    generator = torch.Generator().manual_seed(1)
    if model.base_model.main_input_name == "pixel_values":
        pixels = torch.randn(len(lengths), 3, 16, 16, generator=generator)
        return {"pixel_values": pixels.to(model.dtype)}, torch.ones(len(lengths), 17, dtype=torch.bool)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, VOCABULARY, real.shape, generator=generator)
    inputs = {"input_ids": tokens * real, "attention_mask": real.long()}
    return inputs if model.base_model is model else {**inputs, "use_cache": False}, real


def outputs_and_gradients(model: nn.Module, lengths: list[int], fused: bool) -> Found:
    inputs, real = inputs_of(model, lengths)
    factors = [factor for _, factor in adapter_parameters(model)]
    with padded_rows(model, fused=fused):
        out = model.base_model(**inputs)[0]
        toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)) * real[..., None]
        grads = torch.autograd.grad((out.float() * toward).sum(), factors)
    return out.detach()[real], list(grads)


@pytest.mark.each_pair
@pytest.mark.parametrize("lengths", LENGTHS, ids=["padded", "equal"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*ENCODERS, *FALCON, "Llama", "GPT2", "GPTNeoX"])
def test_fused_blocks_equal_the_models_own(family, checkpointing, lengths, monkeypatch):
    model = adapted(made(family))
    expected = outputs_and_gradients(model, lengths, fused=False)
    if checkpointing:
        checkpoint_blocks(model)
    assert fused_padded_blocks(model).choice.value, fused_padded_blocks(model).choice.why
    ran = count_runs(monkeypatch)
    with counted_calls(monkeypatch) as calls:
        assert_near(outputs_and_gradients(model, lengths, fused=True), expected)
    assert len(ran) == len(layers_of(model)) * (1 + checkpointing) == calls.count("forward")
    assert all("forward" not in vars(block) for block in layers_of(model))


@pytest.mark.parametrize("family", [*ENCODERS, *FALCON])
def test_in_bf16_fused_blocks_are_as_near_to_fp32_as_the_models_own(family):
    draws = []
    for seed in range(3):
        model, exact = (adapted(made(family, dtype), seed) for dtype in (torch.bfloat16, torch.float32))
        asked = ((model, True), (model, False), (exact, False))
        draws.append(tuple(outputs_and_gradients(each, LENGTHS[0], fused=fused) for each, fused in asked))
    assert_as_near(draws)


@pytest.mark.parametrize(
    "family", ["Bert", *(pytest.param(f, marks=pytest.mark.slow) for f in (*ENCODERS[1:], *FALCON))]
)
def test_a_dry_run_on_fake_tensors_decides_alike(family):
    expected = fused_padded_blocks(made(family, torch.bfloat16))
    with fake_tensors():
        found = fused_padded_blocks(made(family, torch.bfloat16))
    assert found.choice.value == expected.choice.value is True
    assert [b.roles for b in found.blocks] == [b.roles for b in expected.blocks]


def test_positions_by_distance_are_left_to_the_models_own_code(monkeypatch):
    assert not can_pack(model_of("Falcon")).value
    model = adapted(model_of("Falcon", alibi=True))
    ran = count_runs(monkeypatch)
    expected, _ = outputs_and_gradients(model, LENGTHS[0], fused=False)
    out, _ = outputs_and_gradients(model, LENGTHS[0], fused=True)
    assert not ran and off(out, expected) == 0.0
    assert not fused_padded_blocks(model).choice.value


@pytest.mark.parametrize("trained", ["output.LayerNorm", "intermediate", "attention.self.value"])
def test_whole_modules_trained_inside_a_block_get_their_gradients(trained):
    model = encoder_of("Bert")
    assert fused_padded_blocks(model).choice.value
    adapted(model, target_modules=["key"], train_modules=[trained])
    expected = outputs_and_gradients(model, LENGTHS[0], fused=False)
    assert_near(outputs_and_gradients(model, LENGTHS[0], fused=True), expected)


@pytest.mark.each_pair
@pytest.mark.parametrize("lengths", [LENGTHS[0], [500, 3, 480]], ids=["few rows", "many rows"])
@pytest.mark.parametrize("int8", ["", "int8", "int8 in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", [*ENCODERS, *FALCON, "GPT2"])
def test_a_block_in_one_call_is_the_same_to_the_bit(family, dtype, int8, lengths, monkeypatch):
    model = made(family, dtype)
    if int8:
        inputs, _ = inputs_of(model, LENGTHS[0])
        worth = math.inf if "in blocks" in int8 else 0.0
        monkeypatch.setattr("deltaw.runtime.quantized_weights.WORTH_BLOCKS", worth)
        assert quantize_int8(model.base_model, lambda: model.base_model(**inputs)).layers
    adapted(model)
    own, _ = outputs_and_gradients(model, lengths, fused=False)
    assert fused_padded_blocks(model).choice.value  # recognition makes calls of its own
    blocks = len(layers_of(model))
    out, _ = assert_same_in_one_call(
        lambda: outputs_and_gradients(model, lengths, fused=True), monkeypatch, blocks, blocks
    )
    assert off(out, own) < 0.05
