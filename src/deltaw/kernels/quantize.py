"""Quantization of matrices to int8: activations on the fly, weights once.

Activations become uint8 with zero point 128 and a scale per row, or per block of ``INT8_BLOCK`` numbers. Weights become
int8 with a scale per row. SmoothQuant scales (arXiv 2211.10438, eq. 3) multiply the activations before they are
quantized.

A row or block that contains a non-finite number gets the scale NaN. The result is then NaN instead of a wrong finite
number, so a fault in training is detected at its source.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.operators import check_shape, define

INT8 = torch.int8
# Numbers of a row that share a scale. The C++ kernels use the same constant.
INT8_BLOCK = 128
# Maximum number of uint8 · int8 products, each at most 255 · 127, whose sum fits in 32 bits.
MAX_SUM_LENGTH = (2**31 - 1) // (255 * 127)


def quantize_activations(x: Tensor, smooth_scales: Tensor | None, in_blocks: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize rows (M, K) to uint8 with zero point 128, so that x·smooth_scales ≈ (uint8 - 128)·scale.

    Args:
        x: (M, K) activations.
        smooth_scales: (K) SmoothQuant scales or None.
        in_blocks: Use a scale per block of ``INT8_BLOCK`` numbers instead of per row.

    Returns:
        (M, K) uint8 numbers, and fp32 scales (M), or (M, blocks) with ``in_blocks``.
    """
    check_shape("the SmoothQuant scales", smooth_scales, x.shape[-1])
    return _quantized(x, smooth_scales, in_blocks)


def quantize_activations_reference(x: Tensor, smooth: Tensor | None, in_blocks: bool = False) -> tuple[Tensor, Tensor]:
    """Reference implementation of :func:`quantize_activations`."""
    wide = x.float() if smooth is None else x.float() * smooth
    magnitudes = wide.abs()
    if in_blocks:
        magnitudes = F.pad(magnitudes, (0, -x.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    magnitudes = _nan_unless_finite(magnitudes.amax(-1))
    inverse_scales = torch.where(magnitudes > 0, 127.0 / magnitudes, torch.zeros_like(magnitudes))
    signed = torch.round(wide * expand_scales(inverse_scales, x.shape[1])).clamp_(-127, 127).nan_to_num_(0.0)
    return (signed + 128).to(torch.uint8), magnitudes / 127.0


def _nan_unless_finite(magnitudes: Tensor) -> Tensor:
    return magnitudes.masked_fill(~magnitudes.isfinite(), torch.nan)


def expand_scales(scales: Tensor, width: int) -> Tensor:
    """Expand scales of rows (M) or blocks (M, blocks) to (M, 1) or (M, width)."""
    return scales[:, None] if scales.dim() == 1 else scales.repeat_interleave(INT8_BLOCK, 1)[:, :width]


def scales_shape(x: Tensor, in_blocks: bool) -> tuple[int, ...]:
    """Return the shape of the quantization scales of rows x (M, K)."""
    return (x.shape[0], -(-x.shape[1] // INT8_BLOCK)) if in_blocks else (x.shape[0],)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in) to int8 with a scale per row (out)."""
    scale = row_scales(weight)
    return round_rows(weight, scale), scale


def row_scales(weight: Tensor) -> Tensor:
    """Return the fp32 quantization scale of each row (out) of a matrix (out, in)."""
    return _nan_unless_finite(torch.maximum(weight.amax(1), -weight.amin(1)).float()).div_(127.0)


def round_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Quantize a matrix (out, in) to int8 with the given scale of each row."""
    inverse_scale = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return torch.round(weight.float() * inverse_scale[:, None]).clamp_(-127, 127).nan_to_num_(0.0).to(INT8)


def fake_quantize_blocks(grad: Tensor) -> Tensor:
    """Round rows of a gradient to int8 with a scale per ``INT8_BLOCK`` numbers, and return the dequantized values."""
    blocks = F.pad(grad, (0, -grad.shape[1] % INT8_BLOCK)).unflatten(1, (-1, INT8_BLOCK))
    scale = _nan_unless_finite(blocks.abs().amax(-1, keepdim=True)) / 127
    signed = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks))
    return (torch.round(signed) * scale).flatten(1)[:, : grad.shape[1]]


def empty_int8(x: Tensor, in_blocks: bool) -> tuple[Tensor, Tensor]:
    """Return uninitialized tensors for quantized rows x (M, K) and their scales."""
    return torch.empty(x.shape, dtype=torch.uint8), torch.empty(scales_shape(x, in_blocks))


@define(
    "quantized(Tensor x, Tensor? smooth_scales, bool in_blocks) -> (Tensor, Tensor)",
    lambda x, smooth_scales, in_blocks: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(scales_shape(x, in_blocks), dtype=torch.float32),
    ),
)
def _quantized(x: Tensor, smooth_scales: Tensor | None, in_blocks: bool) -> tuple[Tensor, Tensor]:
    if not loader.supports(x) or not (smooth_scales is None or smooth_scales.dtype == torch.float32):
        return quantize_activations_reference(x, smooth_scales, in_blocks)
    x = x.contiguous()
    smooth_scales = None if smooth_scales is None else smooth_scales.contiguous()
    rounded, scales = empty_int8(x, in_blocks)
    loader.kernels().dw_quantize(
        loader.dtype_code(x.dtype), *x.shape, x.data_ptr(), loader.address(smooth_scales), in_blocks,
        rounded.data_ptr(), scales.data_ptr(),
    )  # fmt: skip
    return rounded, scales
