"""Weights in blocks: their values are those of llama.cpp's own description of the formats, and of NF4's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deltaw.kernels.block_linear import (
    FORMATS,
    NF4_GROUP,
    BlockWeight,
    dynamic_codes,
    nf4_values,
    quantize_nf4,
    reference_dequantize,
    rows_of,
)

VARIANTS = "none"

GGUF_FORMATS = [name for name in FORMATS if name != "NF4"]
# Where in a block its fp16 numbers stand.
SCALES_AT = dict.fromkeys(GGUF_FORMATS, (0,)) | dict.fromkeys(("Q4_1", "Q4_K", "Q5_K"), (0, 2))
SCALES_AT["Q6_K"] = (208,)


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> BlockWeight:
    """Blocks of random bytes whose fp16 scales are ordinary numbers, some of them subnormal or negative."""
    of = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    if name == "NF4":
        return quantize_nf4(torch.randn(rows, columns, generator=generator) * 0.1)
    data = torch.randint(0, 256, (rows * columns // of.block, of.bytes), generator=generator, dtype=torch.uint8)
    for at in SCALES_AT[name]:
        scale = torch.randn(len(data), 1, generator=generator) * 0.02
        scale[::7] *= 1e-4
        data[:, at : at + 2] = scale.half().view(torch.uint8)
    return BlockWeight(data.view(rows, -1), name, columns)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_values_are_those_of_the_format(name: str) -> None:

    quants = pytest.importorskip("gguf.quants", reason="the format's own description is not installed")
    weight = random_blocks(name, 5, 512)
    expected = quants.dequantize(weight.data.numpy(), quants.GGMLQuantizationType[name])
    found = reference_dequantize(weight, torch.float32)
    assert np.array_equal(found.numpy(), expected)
    assert found.shape == weight.shape == (5, 512)
    assert found.std() > 0


def test_rows_in_another_order_keep_their_values() -> None:
    weight, order = random_blocks("Q5_K", 4, 256), torch.tensor([2, 0, 3, 1])
    assert torch.equal(rows_of(weight, order).dequantized(torch.float32), weight.dequantized(torch.float32)[order])
    with pytest.raises(ValueError, match="share scales"):
        rows_of(random_blocks("NF4", 4, 256), order)


def test_nf4_rounds_to_the_nearest_of_its_values() -> None:
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(1)) * 0.05
    found = quantize_nf4(weight)
    scales = weight.view(-1, 64).abs().amax(1)
    steps = (weight.view(-1, 64) / scales[:, None])[..., None] - nf4_values()
    plain = scales[:, None] * nf4_values()[steps.abs().argmin(-1)]
    values = found.dequantized(torch.float32).view(-1, 64)
    # Scales in 8 bits are off by at most half of the codes' largest distance, 0.0141 of a group's largest.
    spread = (scales - scales.mean()).abs().max()
    assert 0 < (values - plain).abs().max() <= 0.0141 / 2 * spread * 1.001
    assert not quantize_nf4(torch.zeros(2, 64)).dequantized(torch.float32).any()
    assert found.group_scale is not None and len(found.group_scale) == -(-300 * 3 // NF4_GROUP)


def test_the_codes_of_scales_are_256_that_ascend() -> None:
    codes = dynamic_codes()
    assert len(codes) == 256 and bool((codes.diff() > 0).all())
    assert codes[-1] == 1 and codes[127] == 0 and codes.diff().max() < 0.0141
    assert torch.equal(codes[:127], -codes[128:255].flip(0))


BYTES = torch.zeros(2, 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("data", "name", "columns", "said"),
    [
        (BYTES[:, :18], "Q9", 32, "no block format"),
        (BYTES[:, :18], "Q4_0", 33, "whole number"),
        (BYTES, "Q4_0", 32, "blocks are"),
        (BYTES[:, :18].float(), "Q4_0", 32, "blocks are"),
        (torch.zeros(2, 32, dtype=torch.uint8), "NF4", 64, "NF4's scales"),
    ],
)
def test_what_is_no_such_matrix_is_refused(data: Tensor, name: str, columns: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BlockWeight(data, name, columns)
