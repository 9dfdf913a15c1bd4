"""Depthwise causal convolution over a prefix tree of segments.

For each channel, y_t = f(bias + Σ_w weight_w · x_{t−W+1+w}) with w = 0 … W − 1 (arXiv 2312.00752, section 3.4, W = 4).
f is the identity or SiLU. The tokens before a segment are those of its ancestors. Tokens before the root are zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.layout import Layout, to_device
from deltaw.kernels.operators import accumulation_dtype, check_shape, define


def packed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, silu: bool = False) -> Tensor:
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
    _check_shapes(x, weight, bias, layout)
    return _Convolution.apply(x, weight, bias, layout, silu)


def convolution_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, *, silu: bool = False
) -> Tensor:
    """Reference implementation of :func:`packed_convolution`. Supports autograd."""
    dtype = accumulation_dtype(x)
    y = _weighted_sum(torch.cat([x, x.new_zeros(1, x.shape[1])]).to(dtype), weight.to(dtype), layout)
    y = y if bias is None else y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def continue_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, states: Tensor, rows: Tensor, *, silu: bool = False
) -> Tensor:
    """Return :func:`packed_convolution` for segments that continue given tokens. No autograd.

    Args:
        x, weight, bias, silu: See :func:`packed_convolution`.
        layout: Layout of the T tokens, S segments without parents.
        states: (slots, (W - 1)·channels) fp32 rows of x before each segment, which are replaced by the last rows at its
            end. A new sequence starts with zeros.
        rows: (S,) int64 index in ``states`` of each segment's state.
    """
    _check_shapes(x, weight, bias, layout)
    width = weight.shape[1]
    key = ("continued", width)
    if key not in layout.masks:
        layout.masks[key] = tuple(map(torch.from_numpy, _continued_positions(layout, width)))
    indices, last = layout.masks[key]
    before = states.index_select(0, rows).view(-1, x.shape[1]).to(x.dtype)
    extended = torch.cat([x, before])
    states.index_copy_(0, rows, extended[last].flatten(1).to(states.dtype))
    if loader.supports(extended):
        return _convolution(extended, weight, bias, indices, silu)[: len(x)]
    dtype = accumulation_dtype(x)
    taps = weight.to(dtype).t().flip(0)
    y = (extended[indices[:, : len(x)]].to(dtype) * taps[:, None]).sum(0)
    y = y if bias is None else y + bias.to(dtype)
    return (F.silu(y) if silu else y).to(x.dtype)


def _continued_positions(layout: Layout, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of tokens in the extended row: T tokens, then the ``width - 1`` tokens before each segment.

    Returns:
        (width, extended length) predecessors of each token, and (S, ``width - 1``) last tokens at the end of each
        segment. Only the first T columns of the predecessors are used.
    """
    count = len(layout.starts)
    length = layout.length
    history = width - 1
    total = length + count * history
    segment = np.repeat(np.arange(count), layout.stops - layout.starts)
    token = np.arange(length)

    def extended_index(segments: np.ndarray, positions: np.ndarray, starts: np.ndarray) -> np.ndarray:
        earlier = length + segments * history + history + positions - starts
        return np.where(positions >= starts, positions, earlier)

    indices = np.full((width, total), total)
    for step in range(width):
        indices[step, :length] = extended_index(segment, token - step, layout.starts[segment])
    last = layout.stops[:, None] - np.arange(history, 0, -1)
    return indices, extended_index(np.arange(count)[:, None], last, layout.starts[:, None])


def predecessors(layout: Layout, width: int) -> Tensor:
    """Return the positions (width, T) of the tokens 0, 1, … ``width - 1`` steps before each token.

    Tokens before the root have the position T. The layout caches the result by width.
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
    last_tokens: list[int] = []  # last token of each segment. Empty segments inherit it.
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


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> None:
    if x.dim() != 2 or x.shape[0] != layout.length:
        raise ValueError(f"the layout has {layout.length} tokens, but x is {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or not weight.shape[1]:
        raise ValueError(f"the weights {tuple(weight.shape)} do not fit {x.shape[1]} channels")
    check_shape("the bias", bias, x.shape[1])


def _weighted_sum(padded: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    """Return Σ_w weight_w · x_{t−W+1+w} from (T + 1, channels) tokens, of which the last is a row of zeros."""
    width = weight.shape[1]
    indices = predecessors(layout, width)
    y = padded[indices[0]] * weight[:, width - 1]
    for step in range(1, width):
        y = y.addcmul(padded[indices[step]], weight[:, width - 1 - step])
    return y


@define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, Tensor indices, bool silu) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    lambda x, weight, *_: 2 * x.numel() * weight.shape[1],
)
def _convolution(x, weight, bias, indices, silu):  # type: ignore[no-untyped-def]
    x = x.contiguous()
    taps, kernel_bias = _kernel_weights(weight, bias)
    y = torch.empty_like(x)
    loader.kernels().dw_convolution(
        loader.dtype_code(x.dtype), *x.shape, weight.shape[1], silu, x.data_ptr(), taps.data_ptr(),
        loader.address(kernel_bias), indices.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


@define(
    "convolution_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor indices, bool silu, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, weight, bias, indices, silu, need_weight, need_bias: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    ),
    lambda grad, x, weight, *_: 6 * x.numel() * weight.shape[1],
)
def _convolution_backward(grad, x, weight, bias, indices, silu, need_weight, need_bias):  # type: ignore[no-untyped-def]
    x = x.contiguous()
    taps, kernel_bias = _kernel_weights(weight, bias)
    grad = grad.to(x.dtype).contiguous()
    grad_x = torch.empty_like(x)
    grad_taps = torch.empty_like(taps) if need_weight else None
    grad_kernel_bias = torch.empty(x.shape[1]) if need_bias else None
    loader.kernels().dw_convolution_backward(
        loader.dtype_code(x.dtype), *x.shape, weight.shape[1], silu, grad.data_ptr(), x.data_ptr(),
        taps.data_ptr(), loader.address(kernel_bias), indices.data_ptr(), grad_x.data_ptr(),
        loader.address(grad_taps), loader.address(grad_kernel_bias),
    )  # fmt: skip
    grad_weight = weight.new_empty(0) if grad_taps is None else grad_taps.flip(0).t().to(weight.dtype)
    grad_bias = weight.new_empty(0) if grad_kernel_bias is None else grad_kernel_bias.to(weight.dtype)
    return grad_x, grad_weight, grad_bias


def _kernel_weights(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the weights (W, channels) and the bias in fp32. The weight of the current token is first."""
    return weight.float().t().flip(0).contiguous(), None if bias is None else bias.float().contiguous()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layout, silu):  # type: ignore[override]
        ctx.save_for_backward(x, weight, bias)
        ctx.layout = layout
        ctx.silu = silu
        if loader.supports(x):
            return _convolution(x, weight, bias, predecessors(layout, weight.shape[1]), silu)
        return convolution_reference(x, weight, bias, layout, silu=silu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if loader.supports(x):
            indices = predecessors(ctx.layout, weight.shape[1])
            needed = ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]
            grads = _convolution_backward(grad, x, weight, bias, indices, ctx.silu, *needed)
            return grads[0], *(g if n else None for g, n in zip(grads[1:], needed, strict=True)), None, None
        dtype = accumulation_dtype(x)
        wide = weight.to(dtype)
        padded = torch.cat([x, x.new_zeros(1, x.shape[1])]).to(dtype)
        grad_y = grad.to(dtype)
        if ctx.silu:
            y = _weighted_sum(padded, wide, ctx.layout)
            y = y if bias is None else y + bias.to(dtype)
            sigmoid = torch.sigmoid(y)
            grad_y = grad_y * sigmoid * (1 + y * (1 - sigmoid))
        width = weight.shape[1]
        indices = predecessors(ctx.layout, width)
        grad_x = torch.zeros_like(padded)
        grad_weight = torch.empty_like(wide) if ctx.needs_input_grad[1] else None
        for step in range(width):
            grad_x.index_add_(0, indices[step], grad_y * wide[:, width - 1 - step])
            if grad_weight is not None:
                grad_weight[:, width - 1 - step] = (grad_y * padded[indices[step]]).sum(0)
        grad_bias = grad_y.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None
        converted = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_x[:-1].to(x.dtype), converted, grad_bias, None, None
