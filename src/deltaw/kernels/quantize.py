"""Matrices rounded to int8: inputs as they come, weights once.

Inputs become unsigned numbers around 128, with a scale for each row or for each ``INT8_BLOCK`` numbers of
one; weights become signed numbers, with a scale for each row. SmoothQuant scales (arXiv 2211.10438, eq. 3)
are what inputs are multiplied with before.

What is rounded together with a number that is not finite has the scale NaN, so that it comes back as NaN: a
fault in a training is seen where it happens, and not as a wrong number.

Knows tensors; not products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_shape
from deltaw.kernels.operators import define

INT8 = torch.int8
# Numbers of a row that are rounded with one scale; the kernel's own number.
INT8_BLOCK = 128
# So many products of an unsigned and a signed number, at most 255 · 127 each, fit in a sum of 32 bits.
LONGEST_SUM = (2**31 - 1) // (255 * 127)


def quantized(x: Tensor, smooth_scales: Tensor | None, in_blocks: bool = False) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as unsigned int8 around 128, (M, K): x·smooth_scales ≈ (int8 - 128)·scale.

    There is a scale for each row, (M), or ``in_blocks`` for each ``INT8_BLOCK`` numbers of one, (M, blocks).
    """
    check_shape("the SmoothQuant scales", smooth_scales, x.shape[-1])
    return _quantized(x, smooth_scales, in_blocks)


def quantized_reference(x: Tensor, smooth_scales: Tensor | None, in_blocks: bool = False) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`quantized`."""
    wide = x.float() if smooth_scales is None else x.float() * smooth_scales
    top = wide.abs()
    if in_blocks:
        top = F.pad(top, (0, -x.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    top = _nan_unless_finite(top.amax(-1))
    by = torch.where(top > 0, 127.0 / top, torch.zeros_like(top))
    signed = torch.round(wide * spread_scales(by, x.shape[1])).clamp_(-127, 127).nan_to_num_(0.0)
    return (signed + 128).to(torch.uint8), top / 127.0


def _nan_unless_finite(magnitudes: Tensor) -> Tensor:
    return magnitudes.masked_fill(~magnitudes.isfinite(), torch.nan)


def spread_scales(scales: Tensor, width: int) -> Tensor:
    """Scales of rows, (M), or of blocks of them, (M, blocks), for each number: (M, 1) or (M, width)."""
    return scales[:, None] if scales.dim() == 1 else scales.repeat_interleave(INT8_BLOCK, 1)[:, :width]


def scales_shape(x: Tensor, in_blocks: bool) -> tuple[int, ...]:
    """The shape of the scales of rows x (M, K) in int8."""
    return (x.shape[0], -(-x.shape[1] // INT8_BLOCK)) if in_blocks else (x.shape[0],)


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) as signed int8 with a scale for each row (out)."""
    scale = scales_of_rows(weight)
    return rows_as_int8(weight, scale), scale


def scales_of_rows(weight: Tensor) -> Tensor:
    """What each row (out) of a matrix (out, in) is divided by to be rounded to signed int8, in fp32."""
    return _nan_unless_finite(torch.maximum(weight.amax(1), -weight.amin(1)).float()).div_(127.0)


def rows_as_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """A matrix (out, in) as signed int8, given the scale of each row."""
    by = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return torch.round(weight.float() * by[:, None]).clamp_(-127, 127).nan_to_num_(0.0).to(INT8)


def rounded_in_blocks(grad: Tensor) -> Tensor:
    """What rows of a gradient stand for in int8, with a scale for each ``INT8_BLOCK`` numbers."""
    blocks = F.pad(grad, (0, -grad.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    scale = _nan_unless_finite(blocks.abs().amax(-1, keepdim=True)) / 127
    signed = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks))
    return (torch.round(signed) * scale).flatten(1)[:, : grad.shape[1]]


def _compute_quantized(x: Tensor, smooth_scales: Tensor | None, in_blocks: bool) -> tuple[Tensor, Tensor]:
    if not loader.serves(x) or not (smooth_scales is None or smooth_scales.dtype == torch.float32):
        return quantized_reference(x, smooth_scales, in_blocks)
    x, smooth_scales = x.contiguous(), None if smooth_scales is None else smooth_scales.contiguous()
    rounded, scales = room_for_int8(x, in_blocks)
    loader.kernels().dw_quantize(
        loader.number(x.dtype), *x.shape, x.data_ptr(), loader.address(smooth_scales), in_blocks,
        rounded.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return rounded, scales


def room_for_int8(x: Tensor, in_blocks: bool) -> tuple[Tensor, Tensor]:
    """Where rows x (M, K) in int8 and their scales are to be written."""
    return torch.empty(x.shape, dtype=torch.uint8), torch.empty(scales_shape(x, in_blocks))


_quantized = define(
    "quantized(Tensor x, Tensor? smooth_scales, bool in_blocks) -> (Tensor, Tensor)",
    _compute_quantized,
    lambda x, smooth_scales, in_blocks: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(scales_shape(x, in_blocks), dtype=torch.float32),
    ),
)
