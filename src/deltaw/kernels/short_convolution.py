"""Depthwise causal convolution over a prefix tree of segments.

y_t = f(bias + Σ_w weight_w · x_{t−W+1+w}) for each channel, where the tokens before a segment are those of its
ancestors, and zero before the root (arXiv 2312.00752, section 3.4, uses W = 4).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels.layout import Layout, to_device
from deltaw.kernels.operators import accumulation_dtype


def packed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, silu: bool = False
) -> Tensor:
    """Return the causal convolution of each channel.

    Args:
        x: (T, channels).
        weight: (channels, W).
        bias: (channels,) or None.
        layout: Layout of the T tokens.
        silu: True to apply SiLU to the result.

    Returns:
        (T, channels) in the dtype of ``x``. Sums are in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: if the shapes do not fit.
    """
    if x.dim() != 2 or x.shape[0] != layout.length:
        raise ValueError(f"the layout has {layout.length} tokens, but x is {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(f"the weights {tuple(weight.shape)} do not fit {x.shape[1]} channels")
    return _Convolution.apply(x, weight, bias, layout, silu)


def convolution_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, silu: bool = False
) -> Tensor:
    """Reference implementation of :func:`packed_convolution`. Supports autograd."""
    dtype = accumulation_dtype(x)
    y = _weighted_sum(torch.cat([x, x.new_zeros(1, x.shape[1])]).to(dtype), weight.to(dtype), layout)
    y = y if bias is None else y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def predecessors(layout: Layout, width: int) -> Tensor:
    """Return the positions (width, T) of the tokens 0, 1, … ``width - 1`` steps before each token.

    Tokens before the root have the position T. The result is cached per width.
    """
    key = ("predecessors", width)
    if key not in layout.masks:
        layout.masks[key] = to_device(torch.from_numpy(_predecessors(layout, width)), layout.device)
    indices: Tensor = layout.masks[key]
    return indices


def _predecessors(layout: Layout, width: int) -> np.ndarray:
    length = layout.length
    previous = np.arange(-1, length)
    previous[0] = length
    previous[length] = length
    last_tokens: list[int] = []  # of each segment, or of its parent if it is empty
    for start, stop, parent in zip(layout.starts.tolist(), layout.stops.tolist(), layout.parents.tolist(), strict=True):
        before = last_tokens[parent] if parent >= 0 else length
        if stop > start:
            previous[start] = before
        last_tokens.append(stop - 1 if stop > start else before)
    indices = np.empty((width, length), dtype=np.int64)
    current = np.arange(length)
    for step in range(width):
        indices[step] = current
        current = previous[current]
    return indices


def _weighted_sum(padded: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Return Σ_w weight_w · x of the tokens (T + 1, channels), where the last row is zero."""
    width = weight.shape[1]
    indices = predecessors(layout, width)
    y = padded[indices[0]] * weight[:, width - 1]
    for step in range(1, width):
        y = y.addcmul(padded[indices[step]], weight[:, width - 1 - step])
    return y


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layout, silu):  # type: ignore[override]
        ctx.save_for_backward(x, weight, bias)
        ctx.layout = layout
        ctx.silu = silu
        return convolution_reference(x, weight, bias, layout, silu=silu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        dtype = accumulation_dtype(x)
        wide = weight.to(dtype)
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])]).to(dtype)
        slope = grad.to(dtype)
        if ctx.silu:
            y = _weighted_sum(padded, wide, ctx.layout)
            y = y if bias is None else y + bias.to(dtype)
            sigmoid = torch.sigmoid(y)
            slope = slope * sigmoid * (1 + y * (1 - sigmoid))
        width = weight.shape[1]
        indices = predecessors(ctx.layout, width)
        grad_x = torch.zeros_like(padded)
        grad_weight = torch.empty_like(wide) if ctx.needs_input_grad[1] else None
        for step in range(width):
            grad_x.index_add_(0, indices[step], slope * wide[:, width - 1 - step])
            if grad_weight is not None:
                grad_weight[:, width - 1 - step] = (slope * padded[indices[step]]).sum(0)
        grad_bias = slope.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        converted = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_x[:-1].to(x.dtype), converted, grad_bias, None, None
