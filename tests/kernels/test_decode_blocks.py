"""Steps of a decoder over weights in blocks: to the bit those over the numbers that the blocks stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deltaw.kernels import decode
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.decode import Decoder, DecoderLinear
from tests.kernels.conftest import compiled_only
from tests.kernels.test_block_formats import SCALES_AT, random_blocks
from tests.kernels.test_decode import TOLERANCE, Form, Rows, adapter, decoder, error, new_pages, table_of

VARIANTS = "all"

# Rows of whole blocks of every format; heads' outputs and a vocabulary that fill no vector.
FORM = Form(kind="bf16", hidden=256, heads=4, key_heads=2, head_size=64, inner=512, turned=32,
            vocabulary=101, cache=torch.bfloat16)  # fmt: skip
FORMS = {
    "llama": FORM,
    "grouped, with biases": replace(FORM, split="grouped", parallel=True, gated=False, bias=True),
    "joint gate": replace(FORM, split="stacked", joint_gate=True),
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


def in_blocks(of: Decoder, names: list[str]) -> tuple[Decoder, Decoder]:
    """The decoder with random blocks for weights, of these formats in turn, and the one of their numbers."""
    made: dict[int, tuple[DecoderLinear, DecoderLinear]] = {}

    def both(layer: DecoderLinear) -> tuple[DecoderLinear, DecoderLinear]:
        weight = drawn(names[len(made) % len(names)], layer.outputs, layer.inputs, len(made))
        numbers = weight.dequantized(torch.bfloat16)
        made[id(layer)] = replace(layer, weight=weight), replace(layer, weight=numbers)
        return made[id(layer)]

    decoders = []
    layers = [[(name, both(layer)) for name, layer in block.layers()] for block in of.blocks]
    head = both(of.head)
    for which in (0, 1):
        blocks = [
            replace(block, **{name: pair[which] for name, pair in own})
            for block, own in zip(of.blocks, layers, strict=True)
        ]
        decoders.append(Decoder(blocks, of.final_norm, head[which], of.tables, cache_dtype=of.cache_dtype))
    return decoders[0], decoders[1]


def run(of: Decoder, steps: list[Rows]) -> list[torch.Tensor]:
    """The logits of steps, one after another, with three adapters."""
    adapters = [adapter(of, seed) for seed in range(3)]
    pages, table = new_pages(of, 24), table_of(3, 8)
    return [rows.step(of, pages, table, adapters)[1] for rows in steps]


def steps_of() -> list[Rows]:
    """Prompts of more rows than a tile has, then one row alone, then some beside each other."""
    return [
        Rows.of(FORM.hidden, [(0, 0, 140, 0), (2, 0, 33, -1), (1, 0, 7, 2)], seed=1),
        Rows.of(FORM.hidden, [(1, 7, 1, 2)], seed=2),
        Rows.of(FORM.hidden, [(2, 33, 1, -1)], seed=3),
        Rows.of(FORM.hidden, [(0, 140, 1, 0), (1, 8, 1, 1), (2, 34, 1, -1)], seed=4),
    ]


@pytest.mark.each_pair
@compiled_only
@pytest.mark.parametrize("name", [*FORMATS, "mixed"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_over_blocks_are_those_over_their_numbers(form, name, monkeypatch):
    monkeypatch.setattr(decode, "reference_step", None)
    blocks, plain = in_blocks(decoder(FORMS[form]), list(FORMATS) if name == "mixed" else [name])
    assert isinstance(blocks.head.weight, BlockWeight)
    before, expected = torch.get_num_threads(), run(plain, steps_of())
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for ours, own in zip(run(blocks, steps_of()), expected, strict=True):
                assert torch.equal(ours, own)
    finally:
        torch.set_num_threads(before)
    assert float(expected[0].std()) > 0.01


@pytest.mark.each_value
@pytest.mark.parametrize("name", FORMATS)
def test_steps_over_blocks_are_the_reference_implementations(kernels, name):
    of, plain = in_blocks(decoder(FORM), [name])
    table, pages = table_of(3, 8), [new_pages(of, 24) for _ in range(3)]
    adapters = [adapter(of, seed) for seed in range(3)]
    for rows in steps_of():
        _, exact = rows.reference(plain, pages[0], table, adapters)  # of the numbers, in float64
        ours, own = (rows.step(d, p, table, adapters)[1] for d, p in zip((of, plain), pages[1:], strict=True))
        # What a format adds to all numbers of a block cancels in sums, and leaves their errors.
        assert max(error(ours, exact), error(own, exact)) < 2 * TOLERANCE["bf16"]


@compiled_only
def test_a_row_over_blocks_has_the_same_bits_alone_and_in_any_company():
    of, _ = in_blocks(decoder(FORM), list(FORMATS))
    adapters = [adapter(of, seed) for seed in range(3)]
    table, together, alone = table_of(3, 8), new_pages(of, 24), new_pages(of, 24)
    rows = Rows.of(FORM.hidden, [(0, 0, 37, 0), (1, 0, 3, 1), (2, 0, 20, -1)])
    _, logits = rows.step(of, together, table, adapters)
    for m in range(len(rows.hidden)):
        assert torch.equal(rows.some(slice(m, m + 1)).step(of, alone, table, adapters)[1][0], logits[m]), m


def test_parts_in_blocks_that_do_not_fit_are_refused():
    weight = random_blocks("Q8_0", 8, 64)
    with pytest.raises(ValueError, match="scales"):
        DecoderLinear(weight, scale=torch.ones(8))
    with pytest.raises(ValueError, match="empty"):
        DecoderLinear(BlockWeight(torch.empty(0, 68, dtype=torch.uint8), "Q8_0", 64))
    with pytest.raises(ValueError, match="bias"):
        DecoderLinear(weight, torch.ones(9))
