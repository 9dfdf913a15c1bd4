"""Tests of block formats against the implementations of the gguf package and the definition of NF4."""

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
    nf4_levels,
    quantize_nf4,
    reference_dequantize,
)

VARIANTS = "none"

GGUF_FORMATS = [name for name in FORMATS if name != "NF4"]
# Offsets of the fp16 scales within a block.
SCALES_AT = dict.fromkeys(GGUF_FORMATS, (0,)) | dict.fromkeys(("Q4_1", "Q4_K", "Q5_K"), (0, 2))
SCALES_AT["Q6_K"] = (208,)


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> BlockWeight:
    """Return blocks of random bytes with realistic fp16 scales, some of them subnormal or negative."""
    block_format = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    if name == "NF4":
        return quantize_nf4(torch.randn(rows, columns, generator=generator) * 0.1)
    shape = (rows * columns // block_format.block, block_format.bytes)
    data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    for offset in SCALES_AT[name]:
        scale = torch.randn(len(data), 1, generator=generator) * 0.02
        scale[::7] *= 1e-4
        data[:, offset : offset + 2] = scale.half().view(torch.uint8)
    return BlockWeight(data.view(rows, -1), name, columns)


@pytest.mark.parametrize("name", GGUF_FORMATS)
def test_dequantized_values_match_gguf(name: str) -> None:

    quants = pytest.importorskip("gguf.quants", reason="gguf is not installed")
    weight = random_blocks(name, 5, 512)
    expected = quants.dequantize(weight.data.numpy(), quants.GGMLQuantizationType[name])
    actual = reference_dequantize(weight, torch.float32)
    assert np.array_equal(actual.numpy(), expected)
    assert actual.shape == weight.shape == (5, 512)
    assert actual.std() > 0


def test_nf4_rounds_to_nearest_level() -> None:
    weight = torch.randn(300, 192, generator=torch.Generator().manual_seed(1)) * 0.05
    quantized = quantize_nf4(weight)
    scales = weight.view(-1, 64).abs().amax(1)
    steps = (weight.view(-1, 64) / scales[:, None])[..., None] - nf4_levels()
    plain = scales[:, None] * nf4_levels()[steps.abs().argmin(-1)]
    values = quantized.dequantized(torch.float32).view(-1, 64)
    # The error of an 8-bit scale is at most half of the largest gap between codes (0.0141), relative to the group's
    # largest scale.
    spread = (scales - scales.mean()).abs().max()
    assert 0 < (values - plain).abs().max() <= 0.0141 / 2 * spread * 1.001
    assert not quantize_nf4(torch.zeros(2, 64)).dequantized(torch.float32).any()
    assert quantized.group_scale is not None and len(quantized.group_scale) == -(-300 * 3 // NF4_GROUP)


def test_scale_codes_are_256_ascending_values() -> None:
    codes = dynamic_codes()
    assert len(codes) == 256 and bool((codes.diff() > 0).all())
    assert codes[-1] == 1 and codes[127] == 0 and codes.diff().max() < 0.0141
    assert torch.equal(codes[:127], -codes[128:255].flip(0))


BYTES = torch.zeros(2, 20, dtype=torch.uint8)


INVALID_BLOCK_MATRICES = [(BYTES[:, :18], "Q9", 32, "unknown block format")]
INVALID_BLOCK_MATRICES += [(BYTES[:, :18], "Q4_0", 33, "not a multiple"), (BYTES, "Q4_0", 32, "blocks must be")]
INVALID_BLOCK_MATRICES += [(BYTES[:, :18].float(), "Q4_0", 32, "blocks must be")]
INVALID_BLOCK_MATRICES += [(torch.zeros(2, 32, dtype=torch.uint8), "NF4", 64, "NF4's scales")]


@pytest.mark.parametrize(("data", "name", "columns", "message"), INVALID_BLOCK_MATRICES)
def test_invalid_block_matrix_raises(data: Tensor, name: str, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockWeight(data, name, columns)
