"""DoRA in closed form: y = g∘(x·Wᵀ + s·(x·A)·B) + b with g = m / ‖W + ΔW‖ (arXiv 2402.09353, eq. 5).

The magnitude m has one trained value per row of W. The norm is a constant in the backward (section 4.3 of the paper),
computed without forming ΔW. In addition to the tensors of plain LoRA, the output y is saved, from which the gradient of
m follows. The next layer can share it if it saves its input, as activation functions do. The output must not be
modified in place before the backward, otherwise torch raises an error. See ``docs/method.md`` for the derivation, and
:func:`dora_linear_reference` for the reference implementation.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels.linear import plus_product
from deltaw.lora.math import autocast_input, is_autocast_enabled, needs_reference, num_rows, reshape_output, scaled

BLOCK = 1 << 20
"""Number of elements converted to another precision at a time."""


@torch.no_grad()
def base_squares(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ‖wᵢ‖² of every row of ``weight`` (out, in), summed in ``dtype``, of shape (out)."""
    return torch.cat([block.to(dtype).square().sum(1) for block in _row_blocks(weight)])


@torch.no_grad()
def weight_norm(weight: Tensor, squares: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return ‖wᵢ + s·(AB)ᵢ‖ of every output in the factors' dtype, without forming ΔW.

    Args:
        weight: (out, in) of any precision, or a view of that shape.
        squares: ‖wᵢ‖² from :func:`base_squares`.
        lora_A: (in, r).
        lora_B: (r, out).
        scaling: s.

    Returns:
        (out): √(‖wᵢ‖² + 2s·(W·A)ᵢ·bᵢ + s²·bᵢᵀ(AᵀA)bᵢ), without a graph.
    """
    factor_A = lora_A.detach()
    factor_B = lora_B.detach()
    with without_autocast(weight.device.type):
        if weight.dtype == factor_A.dtype:
            crossed = weight.detach() @ factor_A
        else:
            crossed = torch.cat([block.to(factor_A.dtype) @ factor_A for block in _row_blocks(weight)])
        slope = 2 * scaling * crossed.t() + scaling**2 * ((factor_A.t() @ factor_A) @ factor_B)
        return (squares + (slope * factor_B).sum(0)).clamp(min=0).sqrt()


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Context manager that disables autocast. Has no effect on the meta device, which has no autocast."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return g = m / ‖W + ΔW‖. It is 0 for a zero row, which has no direction."""
    return magnitude / norm.masked_fill(norm == 0, float("inf"))


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    dropout: float = 0.0,
    weight_is_in_out: bool = False,
) -> Tensor:
    """Return y = x·Wᵀ + b + (g − 1)∘(x̃·Wᵀ) + g∘(s·x̃·A·B) with x̃ = dropout(x). Without dropout this is g∘(x·W'ᵀ) + b.

    As in PEFT, W also multiplies the dropped input. Dtypes are handled as in ``math.linear``.

    Args:
        x: (..., in).
        weight: (out, in), or (in, out) with ``weight_is_in_out``. Frozen.
        bias: (out) or None. Gets a gradient if it requires one.
        lora_A: (in, r).
        lora_B: (r, out).
        magnitude: m (out).
        norm: (out) from :func:`weight_norm`, treated as a constant.
        scaling: s.
        dropout: Share of the adapter's inputs that is set to 0. The rest is scaled by 1 / (1 − share).
        weight_is_in_out: True if W is (in, out).

    Returns:
        (..., out).
    """
    x = autocast_input(x)
    mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout) if dropout > 0.0 else None
    call = dora_linear_reference if needs_reference(weight) else _DoRALinear.apply
    return call(x, weight, bias, lora_A, lora_B, magnitude, norm, scaling, mask, 1.0 - dropout, weight_is_in_out)


def dora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    keep_share: float = 1.0,
    weight_is_in_out: bool = False,
) -> Tensor:
    """Reference implementation of :func:`dora_linear`. ``mask`` (bool, shape of x) selects the adapter's inputs."""
    matrix = weight.t() if weight_is_in_out else weight
    g = gain(magnitude, norm).to(x.dtype)
    adapter_input = x if mask is None else x * mask / keep_share
    update = (adapter_input @ lora_A.to(x.dtype)) @ (lora_B * scaling).to(x.dtype)
    y = F.linear(x, matrix, bias)
    return y + (g - 1) * F.linear(adapter_input, matrix) + g * update


class _DoRALinear(torch.autograd.Function):
    """Closed form of :func:`dora_linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, magnitude, norm, scaling, mask, keep_share, weight_is_in_out):  # type: ignore
        base_weight = weight.to(x.dtype) if is_autocast_enabled(x.device.type) else weight
        matrix = base_weight.t() if weight_is_in_out else base_weight
        flat = x.reshape(num_rows(x), x.shape[-1])
        adapter_input = flat if mask is None else flat * mask.reshape(flat.shape)
        h = adapter_input @ lora_A.to(x.dtype)
        # The factor of g, except 1 / keep, which is multiplied into the small g.
        direction = plus_product(h @ scaled(lora_B, scaling, x.dtype), adapter_input, matrix.t())
        g = (gain(magnitude, norm) / keep_share).to(x.dtype)
        base_bias = None if bias is None else bias.to(x.dtype)
        if mask is not None:
            y = F.linear(flat.sub(adapter_input, alpha=1 / keep_share), matrix, base_bias).addcmul_(direction, g)
        elif base_bias is None:
            y = direction.mul_(g)
        else:
            y = torch.addcmul(base_bias, direction, g, out=direction)
        out = reshape_output(y, x.shape[:-1])
        needs = ctx.needs_input_grad
        saved = None if not needs[5] else out if mask is None else direction
        inputs = x if needs[3] or needs[4] else None, h if needs[4] else None
        frozen = weight if needs[0] or needs[5] else None
        ctx.save_for_backward(*inputs, lora_A, lora_B, magnitude, norm, frozen, bias, mask, saved)
        ctx.scaling = scaling
        ctx.keep = keep_share
        ctx.weight_is_in_out = weight_is_in_out
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h, lora_A, lora_B, magnitude, norm, weight, bias, mask, saved = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, needs_m = ctx.needs_input_grad[:6]
        grad = grads[0]
        dtype = grads[0].dtype
        rows = num_rows(grad)
        grad_y = grad.reshape(rows, grad.shape[-1])
        grad_x = grad_bias = grad_A = grad_B = grad_m = adapter_input = narrow = None
        g = gain(magnitude, norm) / ctx.keep
        create_graph = torch.is_grad_enabled()
        if needs_A or needs_B or (needs_m and create_graph):
            adapter_input = x if mask is None else x * mask
            adapter_input = adapter_input.reshape(rows, adapter_input.shape[-1])
            if create_graph:
                # For second-order gradients, h must be a function of x and A.
                h = adapter_input @ lora_A.to(dtype)
        if needs_x or needs_A:
            narrow = grad_y @ scaled(lora_B * g, ctx.scaling, dtype).t()
        if needs_A and adapter_input is not None and narrow is not None:
            grad_A = (adapter_input.t() @ narrow).to(lora_A.dtype)
        if needs_B:
            grad_B = (h.t() @ grad_y).to(lora_B.dtype) * (g * ctx.scaling)
        if needs_bias:
            grad_bias = grad_y.sum(0).to(bias.dtype)
        if needs_m and mask is None:
            grad_m = _from_output(grad_y, saved.reshape(grad_y.shape), bias, magnitude)
        elif needs_m:
            if create_graph and adapter_input is not None:
                matrix = (weight.t() if ctx.weight_is_in_out else weight).to(dtype)
                saved = F.linear(adapter_input, matrix) + h @ scaled(lora_B, ctx.scaling, dtype)
            grad_m = gain(_column_dots(grad_y, saved, magnitude.dtype) / ctx.keep, norm)
        if needs_x and narrow is not None:
            matrix = (weight.t() if ctx.weight_is_in_out else weight).to(dtype)
            grad_x = _input_grad(grad_y, matrix, g, narrow @ lora_A.to(dtype).t(), mask, ctx.keep)
            grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
        return grad_x, None, grad_bias, grad_A, grad_B, grad_m, None, None, None, None, None


def _input_grad(grad_y: Tensor, matrix: Tensor, g: Tensor, update: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Return ∂L/∂x (rows, in): (Y∘g)·W + (Y∘g)·(s·B)ᵀ·Aᵀ, and with dropout also the path Y·W minus the share of x̃."""
    scaled_gradient = plus_product(update, grad_y * g.to(grad_y.dtype), matrix)
    if mask is None:
        return scaled_gradient
    base = grad_y @ matrix
    return base + (scaled_gradient - base / keep) * mask.reshape(base.shape)


def _from_output(grad_y: Tensor, y: Tensor, bias: Tensor | None, magnitude: Tensor) -> Tensor:
    """Return ∂L/∂m = Σ Y∘(y − b) / m over the rows, since (y − b) / m is the factor of m. It is 0 if m is 0."""
    total = _column_dots(grad_y, y, magnitude.dtype)
    if bias is not None:
        total = total - bias.to(magnitude.dtype) * grad_y.sum(0, dtype=magnitude.dtype)
    return gain(total, magnitude)


def _column_dots(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over the rows of left∘right, accumulated in ``dtype``, of shape (out)."""
    if left.dtype == dtype:
        return (left * right).sum(0)
    total = torch.zeros(left.shape[1], dtype=dtype, device=left.device)
    for a, b in zip(_row_blocks(left), _row_blocks(right), strict=True):
        total = total + (a.to(dtype) * b).sum(0)
    return total


def _row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Split ``matrix`` into blocks of rows of about :data:`BLOCK` elements."""
    return torch.split(matrix, max(1, BLOCK // max(1, matrix.shape[1])))
