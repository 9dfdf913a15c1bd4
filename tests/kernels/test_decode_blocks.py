"""Tests that decoding with block-quantized weights is bit-identical to decoding with the dequantized weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaw.kernels import decode, loader
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.decode import Decoder
from deltaw.kernels.decode_reference import DecoderLinear
from tests.kernels.conftest import compiled_only, relative_error, same_bits
from tests.kernels.test_block_formats import SCALES_AT, random_blocks
from tests.kernels.test_decode import (
    TOLERANCE,
    Rows,
    adapters_of,
    assert_rows_are_independent,
    decoder,
    new_pages,
    table_of,
)

VARIANTS = "all"

# Row sizes are multiples of every block size. Head outputs and the vocabulary are not multiples of a vector.
WIDE = {"kind": "bf16", "hidden": 256, "head_size": 64, "inner": 512, "rotary_dims": 32, "cache": torch.bfloat16}
BLOCK_CONFIGS = {"llama": WIDE}
BLOCK_CONFIGS |= {"grouped, with biases": {**WIDE, "split": "grouped", "parallel": True, "gated": False, "bias": True}}
BLOCK_CONFIGS |= {"joint gate": {**WIDE, "split": "stacked", "joint_gate": True}}


def scaled_random_blocks(name: str, rows: int, columns: int, seed: int) -> BlockWeight:
    """Return random blocks scaled so that outputs are about as large as inputs."""
    weight = random_blocks(name, rows, columns, seed)
    if name != "NF4":
        blocks = weight.data.view(-1, weight.block_format.bytes)
        factor = 1 / (float(weight.dequantized(torch.float32).norm()) / rows**0.5)
        for offset in SCALES_AT[name]:
            scales = blocks[:, offset : offset + 2].contiguous().view(torch.float16)
            blocks[:, offset : offset + 2] = (scales.float() * factor).half().view(torch.uint8)
    return weight


def in_blocks(model: Decoder, *names: str) -> tuple[Decoder, Decoder]:
    """Return a decoder with random blocks, cycling through the formats, and one with the dequantized weights."""
    layers = [(n, name, layer) for n, block in enumerate(model.blocks) for name, layer in block.layers()]
    block_layers = {}
    plain_layers = {}
    for index, (n, name, layer) in enumerate([*layers, (-1, "head", model.head)]):
        weight = scaled_random_blocks(names[index % len(names)], layer.outputs, layer.inputs, index)
        block_layers.setdefault(n, {})[name] = replace(layer, weight=weight)
        plain_layers.setdefault(n, {})[name] = replace(layer, weight=weight.dequantized(torch.bfloat16))
    return tuple(
        Decoder(
            [replace(block, **layers_of[n]) for n, block in enumerate(model.blocks)],
            model.final_norm, layers_of[-1]["head"], model.tables, cache_dtype=model.cache_dtype,
        )
        for layers_of in (block_layers, plain_layers)
    )  # fmt: skip


# Prompts with more rows than a tile, then single rows, then a batch.
CHUNKS = [[(0, 0, 140, 0), (2, 0, 33, -1), (1, 0, 7, 2)], [(1, 7, 1, 2)], [(2, 33, 1, -1)]]
CHUNKS += [[(0, 140, 1, 0), (1, 8, 1, 1), (2, 34, 1, -1)]]
STEPS = [Rows.of(WIDE["hidden"], *chunks, seed=seed) for seed, chunks in enumerate(CHUNKS)]


def run(model: Decoder) -> list[torch.Tensor]:
    """Return the logits of consecutive steps with three adapters."""
    adapters = adapters_of(model)
    pages = new_pages(model, 24)
    table = table_of(3, 8)
    return [rows.step(model, pages, table, adapters)[1] for rows in STEPS]


@pytest.mark.each_value
@compiled_only
@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
@pytest.mark.parametrize("config", BLOCK_CONFIGS)
def test_block_steps_are_bit_identical_to_plain_steps(config, name, monkeypatch):
    monkeypatch.setattr(decode, "reference_step", None)
    blocks, plain = in_blocks(decoder(**BLOCK_CONFIGS[config]), *(FORMATS if name == "mixed" else [name]))
    assert isinstance(blocks.head.weight, BlockWeight)
    expected = run(plain)
    tiles = loader.arithmetic().bf16 == "tiles"  # tiles are used for plain weights only
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        actual = run(blocks)
        if tiles:
            assert max(map(relative_error, actual, expected)) < 2 * TOLERANCE["bf16"]
        else:
            assert same_bits(expected, actual)
    assert float(expected[0].std()) > 0.01


@pytest.mark.each_value
@pytest.mark.parametrize("name", FORMATS)
def test_block_steps_match_reference(kernels, name):
    model, plain = in_blocks(decoder(**WIDE), name)
    table = table_of(3, 8)
    pages = new_pages(model, 24)
    adapters = adapters_of(model)
    for rows, block_logits, plain_logits in zip(STEPS, run(model), run(plain), strict=True):
        _, exact = rows.reference(plain, pages, table, adapters)  # dequantized weights in float64
        # The minimum of a block cancels in sums, but the rounding errors of its terms do not.
        assert max(relative_error(block_logits, exact), relative_error(plain_logits, exact)) < 2 * TOLERANCE["bf16"]


@compiled_only
def test_row_with_block_weights_is_bit_identical_in_any_batch():
    model, _ = in_blocks(decoder(**WIDE), *FORMATS)
    rows = Rows.of(WIDE["hidden"], (0, 0, 37, 0), (1, 0, 3, 1), (2, 0, 20, -1))
    assert_rows_are_independent(model, rows, table_of(3, 8), adapters_of(model))


def test_mismatched_block_parts_raise():
    weight = random_blocks("Q8_0", 8, 64)
    empty = BlockWeight(torch.empty(0, 68, dtype=torch.uint8), "Q8_0", 64)
    for parts, message in (
        ((weight, None, torch.ones(8)), "scales"),
        ((empty,), "empty"),
        ((weight, torch.ones(9)), "bias"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderLinear(*parts)
