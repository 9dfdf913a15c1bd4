"""A frozen linear layer with its low-rank update as one product, forward and backward.

    y = x·Wᵀ + b + s·(x·A)·B + added

The update is added while the sums are in registers, so no wide tensor is written for it. W may be
int8-quantized with a scale for each of its rows, and serves forward and backward alike: forward, a row's
scale belongs to an output; backward, it multiplies the gradient before that is rounded to int8 itself, with a
scale for each ``INT8_BLOCK`` of its numbers, since few of them are large.
SmoothQuant scales move outliers from inputs to weights before both are rounded (arXiv 2211.10438, eq. 3):
x·smooth_scales is rounded, and W holds the inverse.

Knows tensors; not modules or training. Each function has a reference implementation in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_shape
from deltaw.kernels.operators import define
from deltaw.kernels.quantize import (
    INT8,
    LONGEST_SUM,
    quantized_reference,
    quantized_rows,
    room_for_int8,
    rounded_in_blocks,
    rows_as_int8,
    scales_shape,
    spread_scales,
)


def can_multiply(x: Tensor, weight: Tensor, lora_A: Tensor | None, by_column: bool = True, int8: bool = False) -> bool:
    """Whether the compiled kernel serves: types, layout, sizes that fill its groups of numbers, and that it
    is the kernels that compute such products at present."""
    if not loader.serves(x) or not loader.multiplies(loader.number(INT8 if int8 else x.dtype)):
        return False
    if not (weight.dtype == INT8 or weight.dtype == x.dtype) or not weight.is_contiguous():
        return False
    if int8 and weight.dtype != INT8 and (weight.dtype != torch.bfloat16 or not by_column):
        return False
    group = 4 if int8 else 4 // x.dtype.itemsize
    if weight.shape[0] % group or weight.shape[1] % group:
        return False
    if lora_A is None:
        return True
    return lora_A.dtype == torch.float32 and lora_A.shape[-1] % (4 // x.dtype.itemsize) == 0


def linear(
    x: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    smooth_scales: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    x_int8: Tensor | None = None,
    x_scales: Tensor | None = None,
    in_blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """y (M, out) and h = x·A (M, r), which the backward wants (empty without an update).

    Args:
        x: (M, in).
        weight: (out, in) with ``by_column``, else (in, out); int8 weights are (out, in).
        scale, smooth_scales: of a weight in int8: (out), and (in) or None. A bf16 weight with a ``scale`` is
            rounded to int8 as it is read, without SmoothQuant scales.
        lora_A, lora_B: (in, r) and (r, out), fp32.
        added: (M, out), such as the residual stream.
        x_int8, x_scales: what :func:`deltaw.kernels.quantize.quantized` made of x, where it was made before.
        in_blocks: whether x is rounded with a scale for each ``INT8_BLOCK`` numbers, not for each row.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    rows, out = x.shape[0], weight.shape[0 if by_column else 1]
    _check_weight(x, weight, by_column, scale, smooth_scales, lora_A, lora_B)
    check_shape("the bias", bias, out)
    check_shape("what is added", added, rows, out)
    if scale is not None:
        check_shape("x in int8", x_int8, *x.shape)
        check_shape("the scales of x in int8", x_scales, *scales_shape(x, in_blocks))
    return _linear(
        x, weight, by_column, scale, smooth_scales, bias, lora_A, lora_B, scaling, added, x_int8, x_scales,
        in_blocks,
    )  # fmt: skip


def linear_reference(
    x: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    smooth_scales: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    x_int8: Tensor | None = None,
    x_scales: Tensor | None = None,
    in_blocks: bool = False,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`linear`."""
    if scale is not None:
        rounded, by = (
            (x_int8, x_scales)
            if x_int8 is not None and x_scales is not None
            else quantized_reference(x, smooth_scales, in_blocks)
        )
        signed = weight if weight.dtype == INT8 else rows_as_int8(weight, scale)
        left = rounded.to(scale.dtype) - 128
        if in_blocks:
            left *= spread_scales(by, x.shape[1])
        sums = left @ signed.to(scale.dtype).t()
        del left  # the plan of memory counts on it
        sums *= scale if in_blocks else by[:, None] * scale
    h, update = x.new_empty(0), None
    if lora_A is not None and lora_B is not None:
        h = x @ lora_A.to(x.dtype)
        update = h @ (lora_B * scaling).to(x.dtype)
    if scale is not None:
        y = (sums if update is None else sums.add_(update)).to(x.dtype)
    else:
        y = plus_product(update, x, weight.t() if by_column else weight)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return (y if added is None else y + added), h


def plus_product(update: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """update + left·right, rounded once; overwrites the update.

    An update is small. Added to a product that was rounded to bf16 before, half of it and more would be less
    than half of the last digit, and lost: not by chance, but wherever the sum is rounded back.
    """
    if update is None:
        return left @ right
    return torch.addmm(update, left, right) if torch.is_grad_enabled() else update.addmm_(left, right)


def linear_backward(
    grad: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    smooth_scales: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
    in_int8: bool = False,
) -> tuple[Tensor, Tensor]:
    """∂L/∂x (M, in) = grad·W + g·Aᵀ + added, and g = grad·(s·B)ᵀ (M, r); each empty where there is none.

    Args:
        in_int8: whether grad·W of a bf16 weight is computed in int8: the weight is rounded as it is read,
            with a scale for each of the rows that it is stored in, and the gradient with one for each
            ``INT8_BLOCK`` numbers.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check_weight(grad, weight, not by_column, smooth_scales, scale, lora_B, lora_A, across=True)
    check_shape("what is added", added, grad.shape[0], weight.shape[1 if by_column else 0])
    return _linear_backward(
        grad, weight, by_column, scale, smooth_scales, lora_A, lora_B, scaling, added, need_x, in_int8
    )


def rounds_gradients(grad: Tensor, weight: Tensor, lora_A: Tensor | None, by_column: bool = True) -> bool:
    """Whether this process computes the gradient of such a layer's input in int8, though its weight is not:
    ``in_int8`` of :func:`linear_backward`."""
    return loader.arithmetic().int8_gradients and _can_round(grad, weight, lora_A, by_column)


def _can_round(grad: Tensor, weight: Tensor, lora_A: Tensor | None, by_column: bool) -> bool:
    """Whether the compiled kernel rounds the two sides of grad·W, which are bf16, as it reads them."""
    return (
        weight.dtype == grad.dtype == torch.bfloat16
        and can_multiply(grad, weight, lora_A, by_column)
        and loader.multiplies(loader.number(INT8))
        and not (weight.shape[0] % 4 or weight.shape[1] % 4)
    )


def linear_backward_reference(
    grad: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    smooth_scales: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
    in_int8: bool = False,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`linear_backward`."""
    narrow = grad.new_empty(0)
    if lora_B is not None:
        narrow = grad @ (lora_B * scaling).to(grad.dtype).t()
    if not need_x:
        return grad.new_empty(0), narrow
    wide = None
    if scale is not None:
        wide = rounded_in_blocks(grad.to(scale.dtype) * scale) @ weight.to(scale.dtype)
        if smooth_scales is not None:
            wide *= smooth_scales
    elif in_int8:
        signed, scale = quantized_rows(weight)
        wide = grad.float() * scale if by_column else grad.float()
        wide = rounded_in_blocks(wide) @ (signed if by_column else signed.t()).float()
        if not by_column:
            wide *= scale
    update = None if lora_A is None else narrow @ lora_A.to(grad.dtype).t()
    if wide is not None:
        dx = (wide if update is None else wide.add_(update)).to(grad.dtype)
    else:
        dx = plus_product(update, grad, weight if by_column else weight.t())
    return (dx if added is None else dx + added), narrow


def _check_weight(
    left: Tensor,
    weight: Tensor,
    by_column: bool,
    out_scales: Tensor | None,
    in_scales: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    across: bool = False,
) -> None:
    """That a product of ``left`` (M, in) with a weight and the factors on both of its sides is one.

    Args:
        first, second: (in, r) and (r, out), or with ``across`` the transposed.
    """
    if left.dim() != 2 or weight.dim() != 2:
        raise ValueError(f"a product is of two matrices, not of {tuple(left.shape)} and {tuple(weight.shape)}")
    n_in, n_out = (weight.shape[1], weight.shape[0]) if by_column else tuple(weight.shape)
    check_shape("the left side", left, left.shape[0], n_in)
    check_shape("the scales of a side", out_scales, n_out)
    check_shape("the scales of a side", in_scales, n_in)
    if (first is None) != (second is None):
        raise ValueError("a low-rank update has two factors, or there is none")
    if first is not None and second is not None:
        rank = first.shape[0 if across else -1]
        check_shape("a factor", first, *((rank, n_in) if across else (n_in, rank)))
        check_shape("a factor", second, *((n_out, rank) if across else (rank, n_out)))


def factors_backward(x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """∂L/∂A = xᵀ·g (in, r) and ∂L/∂B = s·hᵀ·grad (r, out), both in fp32."""
    rows, rank = h.shape
    check_shape("x", x, rows, x.shape[-1])
    check_shape("the gradient", grad, rows, grad.shape[-1])
    check_shape("the gradient of h", narrow, rows, rank)
    return _factors_backward(x, h, grad, narrow, scaling)


def factors_backward_reference(
    x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`factors_backward`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.t() @ narrow).to(wide), (h.t() @ grad).to(wide) * scaling


def _are(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    return all(t is None or t.dtype == dtype for t in tensors)


def _laid_out(*tensors: Tensor | None) -> list[Tensor | None]:
    """As the kernels read them: numbers side by side, rows one after another."""
    return [None if t is None else t.contiguous() for t in tensors]


def _compute_linear(
    x, weight, by_column, scale, smooth_scales, bias, lora_A, lora_B, scaling, added, x_int8, x_scales, in_blocks
):  # type: ignore[no-untyped-def]
    compiled = can_multiply(x, weight, lora_A, by_column, scale is not None) and _are(x.dtype, added)
    compiled = compiled and _are(torch.float32, scale, smooth_scales, lora_B, x_scales)
    compiled = compiled and (scale is None or in_blocks or x.shape[1] <= LONGEST_SUM)
    if not compiled or not (_are(x.dtype, bias) or _are(torch.float32, bias)) or not _are(torch.uint8, x_int8):
        return linear_reference(
            x, weight, by_column, scale, smooth_scales, bias, lora_A, lora_B, scaling, added, x_int8,
            x_scales, in_blocks,
        )  # fmt: skip
    x = x.contiguous()
    scale, smooth_scales, bias, added, x_int8, x_scales = _laid_out(scale, smooth_scales, bias, added, x_int8, x_scales)
    rows, width = x.shape
    out, rank = weight.shape[0] if by_column else weight.shape[1], 0
    y, h = torch.empty(rows, out, dtype=x.dtype), torch.empty(0, dtype=x.dtype)
    if lora_A is not None:
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        rank = lora_A.shape[1]
        h = torch.empty(rows, rank, dtype=x.dtype)
    quantize = scale is not None and x_int8 is None
    if quantize:
        x_int8, x_scales = room_for_int8(x, in_blocks)
    loader.kernels().dw_linear(
        loader.number(x.dtype), rows, out, width, x.data_ptr(), loader.number(weight.dtype),
        weight.data_ptr(), by_column,
        loader.address(scale), loader.address(smooth_scales), loader.address(bias),
        bias is not None and bias.dtype == torch.float32, loader.address(lora_A), loader.address(lora_B),
        rank, scaling, loader.address(added), loader.address(x_int8), loader.address(x_scales), in_blocks,
        quantize, y.data_ptr(), h.data_ptr(),
    )  # fmt: skip
    return y, h


def _compute_linear_backward(
    grad, weight, by_column, scale, smooth_scales, lora_A, lora_B, scaling, added, need_x, in_int8
):  # type: ignore[no-untyped-def]
    compiled = can_multiply(grad, weight, lora_A, by_column, scale is not None) and _are(grad.dtype, added)
    compiled = compiled and (not in_int8 or _can_round(grad, weight, lora_A, by_column))
    if not compiled or not _are(torch.float32, scale, smooth_scales, lora_B):
        return linear_backward_reference(
            grad, weight, by_column, scale, smooth_scales, lora_A, lora_B, scaling, added, need_x, in_int8
        )
    grad = grad.contiguous()
    scale, smooth_scales, added = _laid_out(scale, smooth_scales, added)
    rows, out = grad.shape
    width, rank = weight.shape[1] if by_column else weight.shape[0], 0
    narrow, dx = torch.empty(0, dtype=grad.dtype), torch.empty(0, dtype=grad.dtype)
    if lora_B is not None:
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        rank = lora_B.shape[0]
        narrow = torch.empty(rows, rank, dtype=grad.dtype)
    if need_x:
        dx = torch.empty(rows, width, dtype=grad.dtype)
    rounded = scales = None
    if (scale is not None or in_int8) and need_x:
        rounded, scales = room_for_int8(grad, True)
    loader.kernels().dw_linear_backward(
        loader.number(grad.dtype), rows, out, width, grad.data_ptr(), loader.number(weight.dtype),
        weight.data_ptr(), by_column, loader.address(scale), loader.address(smooth_scales),
        loader.address(lora_A), loader.address(lora_B), rank, scaling, loader.address(added),
        loader.address(rounded), loader.address(scales), dx.data_ptr() if need_x else None,
        narrow.data_ptr(),
    )  # fmt: skip
    return dx, narrow


def _compute_factors_backward(
    x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    if not loader.serves(x, h, grad, narrow):
        return factors_backward_reference(x, h, grad, narrow, scaling)
    x, h, grad, narrow = x.contiguous(), h.contiguous(), grad.contiguous(), narrow.contiguous()
    rows, width, out, rank = *x.shape, grad.shape[1], h.shape[1]
    of_A, of_B = torch.empty(width, rank), torch.empty(rank, out)
    loader.kernels().dw_factors_backward(
        loader.number(x.dtype), rows, width, out, rank, x.data_ptr(), h.data_ptr(), grad.data_ptr(),
        narrow.data_ptr(), scaling, of_A.data_ptr(), of_B.data_ptr(),
    )  # fmt: skip
    return of_A, of_B


def _low_operations(rows: int, lora_A: Tensor | None, lora_B: Tensor | None) -> int:
    return 0 if lora_A is None or lora_B is None else 2 * rows * (lora_A.numel() + lora_B.numel())


def _no_update(x: Tensor, lora_A: Tensor | None) -> Tensor:
    return x.new_empty(0) if lora_A is None else x.new_empty(x.shape[0], lora_A.shape[1])


_linear = define(
    "linear(Tensor x, Tensor weight, bool by_column, Tensor? scale, Tensor? smooth_scales, Tensor? bias, "
    "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? added, Tensor? x_int8, Tensor? x_scales, "
    "bool in_blocks) -> (Tensor, Tensor)",
    _compute_linear,
    lambda x, weight, by_column, scale, smooth_scales, bias, lora_A, *_: (
        x.new_empty(x.shape[0], weight.shape[0] if by_column else weight.shape[1]),
        _no_update(x, lora_A),
    ),
    lambda x, weight, by_column, scale, smooth_scales, bias, lora_A, lora_B, *_: (
        2 * x.shape[0] * weight.numel() + _low_operations(x.shape[0], lora_A, lora_B)
    ),
)
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor weight, bool by_column, Tensor? scale, Tensor? smooth_scales, "
    "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? added, bool need_x, bool in_int8) "
    "-> (Tensor, Tensor)",
    _compute_linear_backward,
    lambda grad, weight, by_column, scale, smooth_scales, lora_A, lora_B, scaling, added, need_x, _: (
        grad.new_empty(grad.shape[0], weight.shape[1] if by_column else weight.shape[0])
        if need_x
        else grad.new_empty(0),
        _no_update(grad, lora_A),
    ),
    lambda grad, weight, by_column, scale, smooth_scales, lora_A, lora_B, scaling, added, need_x, _: (
        2 * grad.shape[0] * weight.numel() * need_x + _low_operations(grad.shape[0], lora_A if need_x else None, lora_B)
    ),
)
_factors_backward = define(
    "factors_backward(Tensor x, Tensor h, Tensor grad, Tensor narrow, float scaling) -> (Tensor, Tensor)",
    _compute_factors_backward,
    lambda x, h, grad, narrow, scaling: (
        x.new_empty(x.shape[1], narrow.shape[1], dtype=torch.float32),
        x.new_empty(h.shape[1], grad.shape[1], dtype=torch.float32),
    ),
    lambda x, h, grad, narrow, scaling: 2 * x.shape[0] * (narrow.shape[1] * x.shape[1] + h.shape[1] * grad.shape[1]),
)
