"""Steps of a decoder over weights in blocks: to the bit those over the numbers that the blocks stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaw.kernels import decode, loader
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.decode import Decoder, DecoderLinear
from tests.kernels.conftest import compiled_only, off, same_bits
from tests.kernels.test_block_formats import SCALES_AT, random_blocks
from tests.kernels.test_decode import (
    TOLERANCE,
    Rows,
    adapters_of,
    assert_alone_as_together,
    decoder,
    new_pages,
    table_of,
)

VARIANTS = "all"

# Rows of whole blocks of every format; heads' outputs and a vocabulary that fill no vector.
WIDE = {"kind": "bf16", "hidden": 256, "head_size": 64, "inner": 512, "turned": 32, "cache": torch.bfloat16}
FORMS = {
    "llama": WIDE,
    "grouped, with biases": {**WIDE, "split": "grouped", "parallel": True, "gated": False, "bias": True},
    "joint gate": {**WIDE, "split": "stacked", "joint_gate": True},
}


def drawn(name: str, rows: int, columns: int, seed: int) -> BlockWeight:
    """Random blocks whose numbers make sums of the size of their inputs."""
    weight = random_blocks(name, rows, columns, seed)
    if name != "NF4":
        blocks = weight.data.view(-1, weight.of.bytes)
        by = 1 / (float(weight.dequantized(torch.float32).norm()) / rows**0.5)
        for at in SCALES_AT[name]:
            scales = blocks[:, at : at + 2].contiguous().view(torch.float16)
            blocks[:, at : at + 2] = (scales.float() * by).half().view(torch.uint8)
    return weight


def in_blocks(of: Decoder, *names: str) -> tuple[Decoder, Decoder]:
    """The decoder with random blocks for weights, of these formats in turn, and the one of their numbers."""
    places = [(n, name, layer) for n, block in enumerate(of.blocks) for name, layer in block.layers()]
    drawn_, numbers = {}, {}
    for count, (n, name, layer) in enumerate([*places, (-1, "head", of.head)]):
        weight = drawn(names[count % len(names)], layer.outputs, layer.inputs, count)
        drawn_.setdefault(n, {})[name] = replace(layer, weight=weight)
        numbers.setdefault(n, {})[name] = replace(layer, weight=weight.dequantized(torch.bfloat16))
    return tuple(
        Decoder(
            [replace(block, **made[n]) for n, block in enumerate(of.blocks)],
            of.final_norm, made[-1]["head"], of.tables, cache_dtype=of.cache_dtype,
        )
        for made in (drawn_, numbers)
    )  # fmt: skip


# Prompts of more rows than a tile has, then one row alone, then some beside each other.
CHUNKS = [
    [(0, 0, 140, 0), (2, 0, 33, -1), (1, 0, 7, 2)],
    [(1, 7, 1, 2)],
    [(2, 33, 1, -1)],
    [(0, 140, 1, 0), (1, 8, 1, 1), (2, 34, 1, -1)],
]
STEPS = [Rows.of(WIDE["hidden"], *chunks, seed=seed) for seed, chunks in enumerate(CHUNKS)]


def run(of: Decoder) -> list[torch.Tensor]:
    """The logits of the steps, one after another, with three adapters."""
    adapters, pages, table = adapters_of(of), new_pages(of, 24), table_of(3, 8)
    return [rows.step(of, pages, table, adapters)[1] for rows in STEPS]


@pytest.mark.each_value
@compiled_only
@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_over_blocks_are_those_over_their_numbers(form, name, monkeypatch):
    monkeypatch.setattr(decode, "reference_step", None)
    blocks, plain = in_blocks(decoder(**FORMS[form]), *(FORMATS if name == "mixed" else [name]))
    assert isinstance(blocks.head.weight, BlockWeight)
    expected = run(plain)
    tiles = loader.arithmetic().bf16 == "tiles"  # which plain numbers are multiplied in, and blocks are not
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = run(blocks)
        if tiles:
            assert max(map(off, found, expected)) < 2 * TOLERANCE["bf16"]
        else:
            assert same_bits(expected, found)
    assert float(expected[0].std()) > 0.01


@pytest.mark.each_value
@pytest.mark.parametrize("name", FORMATS)
def test_steps_over_blocks_are_the_reference_implementations(kernels, name):
    of, plain = in_blocks(decoder(**WIDE), name)
    table, pages, adapters = table_of(3, 8), new_pages(of, 24), adapters_of(of)
    for rows, ours, own in zip(STEPS, run(of), run(plain), strict=True):
        _, exact = rows.reference(plain, pages, table, adapters)  # of the numbers, in float64
        # What a format adds to all numbers of a block cancels in sums, and leaves their errors.
        assert max(off(ours, exact), off(own, exact)) < 2 * TOLERANCE["bf16"]


@compiled_only
def test_a_row_over_blocks_has_the_same_bits_alone_and_in_any_company():
    of, _ = in_blocks(decoder(**WIDE), *FORMATS)
    rows = Rows.of(WIDE["hidden"], (0, 0, 37, 0), (1, 0, 3, 1), (2, 0, 20, -1))
    assert_alone_as_together(of, rows, table_of(3, 8), adapters_of(of))


def test_parts_in_blocks_that_do_not_fit_are_refused():
    weight = random_blocks("Q8_0", 8, 64)
    empty = BlockWeight(torch.empty(0, 68, dtype=torch.uint8), "Q8_0", 64)
    for parts, what in (
        ((weight, None, torch.ones(8)), "scales"),
        ((empty,), "empty"),
        ((weight, torch.ones(9)), "bias"),
    ):
        with pytest.raises(ValueError, match=what):
            DecoderLinear(*parts)
