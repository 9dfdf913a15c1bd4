"""A frozen linear layer whose weight stays in blocks of a few bits, with its low-rank update.

    y = x·Wᵀ + b + s·(x·A)·B + added

The same products as ``linear.py``, forward and backward, with W a :class:`BlockWeight`: the compiled kernels
read its blocks while they lay out a panel of 32 columns, so that no more of W than a panel is ever there as
numbers. Each is rounded to bf16, whatever the type of x: that is what W is.

Knows tensors; not modules or training. Each function has a reference implementation in torch, which takes
some rows of W at a time.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deltaw.kernels import linear as plain
from deltaw.kernels import loader
from deltaw.kernels.block_formats import BlockWeight
from deltaw.kernels.bounds import check_shape
from deltaw.kernels.operators import define

# Bytes of de-quantized rows that torch multiplies with at a time.
REFERENCE_BYTES = 4 << 20


def can_multiply(x: Tensor, weight: BlockWeight, lora_A: Tensor | None) -> bool:
    """Whether the compiled kernel serves: it is there, is the one that multiplies x's type at present, and
    takes the sizes, which must fill its groups of numbers."""
    if not loader.serves(x) or not loader.multiplies(loader.number(x.dtype)):
        return False
    group = 4 // x.dtype.itemsize
    if weight.shape[0] % group or weight.data.device.type != "cpu":
        return False
    return lora_A is None or (lora_A.dtype == torch.float32 and lora_A.shape[-1] % group == 0)


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
        x: (M, in). lora_A, lora_B: (in, r) and (r, out), fp32. added: (M, out).

    Raises:
        ValueError: the shapes do not fit each other.
    """
    out, inputs = weight.shape
    check_shape("the left side", x, len(x), inputs)
    _check_factors(weight, lora_A, lora_B)
    check_shape("the bias", bias, out)
    check_shape("what is added", added, len(x), out)
    y, h = _linear(x, *weight.tensors, weight.format, weight.columns, bias, lora_A, lora_B, scaling, added)
    return y, h


def block_linear_backward(
    grad: Tensor,
    weight: BlockWeight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """∂L/∂x (M, in) = grad·W + g·Aᵀ + added, and g = grad·(s·B)ᵀ (M, r); each empty where there is none.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    out, inputs = weight.shape
    check_shape("the gradient", grad, len(grad), out)
    _check_factors(weight, lora_A, lora_B)
    check_shape("what is added", added, len(grad), inputs)
    dx, narrow = _linear_backward(
        grad, *weight.tensors, weight.format, weight.columns, lora_A, lora_B, scaling, added, need_x
    )
    return dx, narrow


def _check_factors(weight: BlockWeight, lora_A: Tensor | None, lora_B: Tensor | None) -> None:
    if (lora_A is None) != (lora_B is None):
        raise ValueError("a low-rank update has two factors, or there is none")
    if lora_A is not None:
        check_shape("a factor", lora_A, weight.shape[1], lora_A.shape[-1])
        check_shape("a factor", lora_B, lora_A.shape[-1], weight.shape[0])


def block_linear_reference(
    x: Tensor,
    weight: BlockWeight,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`block_linear`."""
    y, h = x.new_empty(len(x), weight.shape[0]), x.new_empty(0)
    factor = None
    if lora_A is not None and lora_B is not None:
        h, factor = x @ lora_A.to(x.dtype), (lora_B * scaling).to(x.dtype)
    for rows in _some_rows(weight):
        update = None if factor is None else h @ factor[:, rows]
        y[:, rows] = plain.plus_product(update, x, _values(weight, rows, x.dtype).t())
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (y if added is None else y + added), h


def block_linear_backward_reference(
    grad: Tensor,
    weight: BlockWeight,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`block_linear_backward`."""
    narrow = grad.new_empty(0)
    if lora_B is not None:
        narrow = grad @ (lora_B * scaling).to(grad.dtype).t()
    if not need_x:
        return grad.new_empty(0), narrow
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = torch.zeros(len(grad), weight.columns, dtype=wide, device=grad.device)
    update = None if lora_A is None else narrow @ lora_A.to(grad.dtype).t()
    for rows in _some_rows(weight):
        sums += plain.plus_product(update, grad[:, rows], _values(weight, rows, grad.dtype))
        update = None
    dx = sums.to(grad.dtype)
    return (dx if added is None else dx + added), narrow


def _some_rows(weight: BlockWeight) -> list[slice]:
    """Rows of which as many are de-quantized at a time as REFERENCE_BYTES hold."""
    height, width = weight.shape
    most = max(1, REFERENCE_BYTES // (4 * width))
    return [slice(first, min(height, first + most)) for first in range(0, height, most)]


def _values(weight: BlockWeight, rows: slice, dtype: torch.dtype) -> Tensor:
    """W's values in these rows, which are numbers of bf16."""
    return weight.dequantized(torch.bfloat16, rows.start, rows.stop).to(dtype)


def _compiled(x: Tensor, weight: BlockWeight, *others: Tensor | None) -> bool:
    """Whether the compiled kernel takes these; ``others``: the factors, and what is added, in x's type."""
    lora_A, lora_B, added = others
    if not can_multiply(x, weight, lora_A) or (added is not None and added.dtype != x.dtype):
        return False
    return lora_B is None or lora_B.dtype == torch.float32


def _laid_out(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _compute_linear(
    x, data, absmax, group_scale, offset, format, columns, bias, lora_A, lora_B, scaling, added
):  # type: ignore[no-untyped-def]
    weight = BlockWeight(data, format, columns, absmax, group_scale, offset)
    known = bias is None or bias.dtype in (x.dtype, torch.float32)
    if not known or not _compiled(x, weight, lora_A, lora_B, added):
        return block_linear_reference(x, weight, bias, lora_A, lora_B, scaling, added)
    x = x.contiguous()
    bias, lora_A, lora_B, added = _laid_out(bias, lora_A, lora_B, added)
    rows, out = len(x), len(data)
    rank = 0 if lora_A is None else lora_A.shape[1]
    y = torch.empty(rows, out, dtype=x.dtype)
    h = torch.empty((rows, rank) if rank else (0,), dtype=x.dtype)
    described = weight.described()
    loader.kernels().dw_linear(
        loader.number(x.dtype), rows, out, columns, x.data_ptr(), weight.number, ctypes.addressof(described),
        True, None, None, loader.address(bias), bias is not None and bias.dtype == torch.float32,
        loader.address(lora_A), loader.address(lora_B), rank, scaling, loader.address(added), None, None,
        False, False, y.data_ptr(), h.data_ptr(),
    )  # fmt: skip
    return y, h


def _compute_linear_backward(
    grad, data, absmax, group_scale, offset, format, columns, lora_A, lora_B, scaling, added, need_x
):  # type: ignore[no-untyped-def]
    weight = BlockWeight(data, format, columns, absmax, group_scale, offset)
    if not _compiled(grad, weight, lora_A, lora_B, added):
        return block_linear_backward_reference(grad, weight, lora_A, lora_B, scaling, added, need_x)
    grad = grad.contiguous()
    lora_A, lora_B, added = _laid_out(lora_A, lora_B, added)
    rows, out = grad.shape
    rank = 0 if lora_B is None else lora_B.shape[0]
    narrow = torch.empty((rows, rank) if rank else (0,), dtype=grad.dtype)
    dx = torch.empty((rows, columns) if need_x else (0,), dtype=grad.dtype)
    described = weight.described()
    loader.kernels().dw_linear_backward(
        loader.number(grad.dtype), rows, out, columns, grad.data_ptr(), weight.number,
        ctypes.addressof(described), True, None, None, loader.address(lora_A), loader.address(lora_B), rank,
        scaling, loader.address(added), None, None, dx.data_ptr() if need_x else None, narrow.data_ptr(),
    )  # fmt: skip
    return dx, narrow


def _narrow_like(x: Tensor, lora_A: Tensor | None) -> Tensor:
    return x.new_empty(0) if lora_A is None else x.new_empty(len(x), lora_A.shape[1])


_BLOCKS = "Tensor data, Tensor? absmax, Tensor? group_scale, Tensor? offset, str format, int columns, "
_linear = define(
    f"block_linear(Tensor x, {_BLOCKS}Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, "
    "Tensor? added) -> (Tensor, Tensor)",
    _compute_linear,
    lambda x, data, absmax, group_scale, offset, format, columns, bias, lora_A, *_: (
        x.new_empty(len(x), len(data)),
        _narrow_like(x, lora_A),
    ),
    lambda x, data, absmax, group_scale, offset, format, columns, bias, lora_A, lora_B, *_: (
        2 * len(x) * len(data) * columns + plain._low_operations(len(x), lora_A, lora_B)
    ),
)
_linear_backward = define(
    f"block_linear_backward(Tensor grad, {_BLOCKS}Tensor? lora_A, Tensor? lora_B, float scaling, "
    "Tensor? added, bool need_x) -> (Tensor, Tensor)",
    _compute_linear_backward,
    lambda grad, data, absmax, group_scale, offset, format, columns, lora_A, lora_B, scaling, added, need_x: (
        grad.new_empty(len(grad), columns) if need_x else grad.new_empty(0),
        _narrow_like(grad, lora_A),
    ),
    lambda grad, data, absmax, group_scale, offset, format, columns, lora_A, lora_B, scaling, added, need_x: (
        2 * len(grad) * len(data) * columns * need_x
        + plain._low_operations(len(grad), lora_A if need_x else None, lora_B)
    ),
)
