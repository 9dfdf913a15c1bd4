"""Products with a weight in blocks of few bits, its low-rank update and a bias, and their gradients.

    y  = x·Wᵀ + b + s·(x·A)·B + added,        dx = g·W + (g·(s·B)ᵀ)·Aᵀ + added

W is de-quantized some rows at a time, so it never stands whole in another form. Knows tensors; not layers or
files.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deltaw.kernels.block_formats import BlockWeight
from deltaw.kernels.operators import define

# Numbers of a weight that are de-quantized at a time.
PIECE = 1 << 20


def block_linear(
    x: Tensor,
    weight: BlockWeight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, out) and h = x·A (M, r), which the backward wants (empty without an update).

    Args:
        x: (M, in), of a floating type, which the result has too.
        lora_A, lora_B: (in, r) and (r, out), fp32.
        added: (M, out), such as the residual stream.
    """
    return _block_linear(
        x, *weight.tensors, weight.format, weight.columns, bias, lora_A, lora_B, scaling, added
    )


def block_linear_backward(
    grad: Tensor,
    weight: BlockWeight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """∂L/∂x (M, in), plus ``added``, and g = grad·(s·B)ᵀ (M, r); each empty where there is none."""
    return _block_linear_backward(
        grad, *weight.tensors, weight.format, weight.columns, lora_A, lora_B, scaling, added, need_x
    )


def pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """First and last row of each part of a weight that is de-quantized at a time."""
    step = max(1, PIECE // columns)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _compute(x, data, absmax, group_scale, offset, form, columns, bias, lora_A, lora_B, scaling, added):  # type: ignore[no-untyped-def]
    weight = BlockWeight(data, form, columns, absmax, group_scale, offset)
    y = x.new_empty(x.shape[0], data.shape[0])
    for first, last in pieces(*weight.shape):
        y[:, first:last] = x @ _numbers(weight, x.dtype, first, last).t()
    if bias is not None:
        y += bias.to(y.dtype)
    h = x.new_empty(0)
    if lora_A is not None:
        h = x @ lora_A.to(x.dtype)
        y.addmm_(h, (lora_B * scaling).to(x.dtype))
    return (y if added is None else y.add_(added)), h


def _compute_backward(
    grad, data, absmax, group_scale, offset, form, columns, lora_A, lora_B, scaling, added, need_x
):  # type: ignore[no-untyped-def]
    narrow = grad.new_empty(0)
    if lora_B is not None:
        narrow = grad @ (lora_B * scaling).to(grad.dtype).t()
    if not need_x:
        return grad.new_empty(0), narrow
    weight = BlockWeight(data, form, columns, absmax, group_scale, offset)
    wide = torch.zeros(grad.shape[0], columns, dtype=torch.promote_types(grad.dtype, torch.float32))
    for first, last in pieces(*weight.shape):
        wide += grad[:, first:last] @ _numbers(weight, grad.dtype, first, last)
    dx = wide.to(grad.dtype)
    if lora_A is not None:
        dx.addmm_(narrow, lora_A.to(grad.dtype).t())
    return (dx if added is None else dx.add_(added)), narrow


def _numbers(weight: BlockWeight, dtype: torch.dtype, first: int, last: int) -> Tensor:
    """Rows of the weight as they count in products: rounded to bf16."""
    return weight.dequantized(torch.bfloat16, first, last).to(dtype)


def _operations(rows: int, data: Tensor, columns: int, lora_A: Tensor | None, lora_B: Tensor | None) -> int:
    low = 0 if lora_A is None or lora_B is None else lora_A.numel() + lora_B.numel()
    return 2 * rows * (data.shape[0] * columns + low)


_WEIGHT = "Tensor data, Tensor? absmax, Tensor? group_scale, Tensor? offset, str format, int columns"
_block_linear = define(
    f"block_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "Tensor? added) -> (Tensor, Tensor)",
    _compute,
    lambda x, data, absmax, group_scale, offset, form, columns, bias, lora_A, *_: (
        x.new_empty(x.shape[0], data.shape[0]),
        x.new_empty(0) if lora_A is None else x.new_empty(x.shape[0], lora_A.shape[1]),
    ),
    lambda x, data, absmax, group_scale, offset, form, columns, bias, lora_A, lora_B, *_: _operations(
        x.shape[0], data, columns, lora_A, lora_B
    ),
)
_block_linear_backward = define(
    f"block_linear_backward(Tensor grad, {_WEIGHT}, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "Tensor? added, bool need_x) -> (Tensor, Tensor)",
    _compute_backward,
    lambda grad, data, absmax, group_scale, offset, form, columns, lora_A, lora_B, scaling, added, need_x: (
        grad.new_empty(grad.shape[0], columns) if need_x else grad.new_empty(0),
        grad.new_empty(0) if lora_A is None else grad.new_empty(grad.shape[0], lora_A.shape[1]),
    ),
    lambda grad, data, absmax, group_scale, offset, form, columns, lora_A, lora_B, *rest: (
        _operations(grad.shape[0], data, columns, lora_A, lora_B) if rest[-1] else 0
    ),
)
