"""A frozen linear layer with its low-rank update as one product, forward and backward.

    y = x·Wᵀ + b + s·(x·A)·B + added

The update goes into the sums while they are in registers, so no wide tensor is skipped for it. W may be
kept as signed bytes with a scale for each of its rows, and serves forward and backward alike: forward, the
row's scale belongs to an output; backward, it goes into the gradient before that is rounded to bytes itself,
with a scale for each ``BYTES_AT_ONCE`` of its numbers, since few of them are large.
``columns`` moves size from inputs to weights before both are rounded (SmoothQuant, arXiv 2211.10438, eq. 3):
x·columns is rounded, and W holds the inverse.

Knows tensors; not modules or training. Each function has a reference implementation in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_targets
from deltaw.kernels.operators import define

BYTES = torch.int8
# Numbers of a gradient that are rounded with one scale; the kernel's own number.
BYTES_AT_ONCE = 128
# From so many rows on, bytes take less time than what rounding the weight costs.
ROWS_FOR_BYTES = 64


def can_multiply(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, by_column: bool = True, int8: bool = False
) -> bool:
    """Whether the compiled kernel serves: types, layout, and sizes that fill its groups of numbers."""
    if not loader.serves(x):
        return False
    if not (weight.dtype == BYTES or weight.dtype == x.dtype) or not weight.is_contiguous():
        return False
    if int8 and weight.dtype != BYTES and (weight.dtype != torch.bfloat16 or not by_column):
        return False
    group = 4 if int8 else 4 // x.dtype.itemsize
    if weight.shape[0] % group or weight.shape[1] % group:
        return False
    if lora_A is None:
        return True
    return lora_A.dtype == torch.float32 and lora_A.shape[-1] % (4 // x.dtype.itemsize) == 0


def quantized(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows (M, K) as bytes around 128 (M, K) with a scale per row (M): x·columns ≈ (byte - 128)·scale."""
    return _quantized(x, columns)


def quantised_reference(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`quantized`."""
    wide = x.float() if columns is None else x.float() * columns
    top = wide.abs().amax(-1)
    by = torch.where(top > 0, 127.0 / top, torch.zeros_like(top))
    steps = torch.round(wide * by[:, None]).clamp_(-127, 127)
    return (steps + 128).to(torch.uint8), top / 127.0


def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) as signed bytes with a scale for each row (out)."""
    scale = scales_of_rows(weight)
    return _rows_as_int8(weight, scale), scale


def scales_of_rows(weight: Tensor) -> Tensor:
    """What each row (out) of a matrix (out, in) is divided by to be rounded to signed bytes, in fp32."""
    return torch.maximum(weight.amax(1), -weight.amin(1)).float().div_(127.0)


def _rows_as_int8(weight: Tensor, scale: Tensor) -> Tensor:
    by = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    return torch.round(weight.float() * by[:, None]).clamp_(-127, 127).to(BYTES)


def linear(
    x: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    x_int8: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, out) and h = x·A (M, r), which the backward wants (empty without an update).

    Args:
        x: (M, in).
        weight: (out, in) with ``by_column``, else (in, out); bytes are (out, in).
        scale, columns: of a weight in int8: (out), and (in) or None. A bf16 weight with a ``scale`` is
            rounded to bytes as it is read, without columns.
        lora_A, lora_B: (in, r) and (r, out), fp32.
        added: (M, out), such as the residual stream.
        x_bytes, x_scales: what :func:`quantized` made of x, where it was made before.
    """
    return _linear(
        x, weight, by_column, scale, columns, bias, lora_A, lora_B, scaling, added, x_int8, x_scales
    )


def linear_reference(
    x: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    x_int8: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`linear`."""
    if scale is not None:
        steps, by = (
            (x_int8, x_scales)
            if x_int8 is not None and x_scales is not None
            else quantised_reference(x, columns)
        )
        signed = weight if weight.dtype == BYTES else _rows_as_int8(weight, scale)
        sums = (steps.to(scale.dtype) - 128) @ signed.to(scale.dtype).t()
        y = (sums * by[:, None] * scale).to(x.dtype)
    else:
        y = x @ (weight.t() if by_column else weight)
    if bias is not None:
        y = y + bias.to(y.dtype)
    h = x.new_empty(0)
    if lora_A is not None and lora_B is not None:
        h = x @ lora_A.to(x.dtype)
        y = torch.addmm(y, h, (lora_B * scaling).to(x.dtype))
    return (y if added is None else y + added), h


def linear_backward(
    grad: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """∂L/∂x (M, in) = grad·W + g·Aᵀ + added, and g = grad·(s·B)ᵀ (M, r); each empty where there is none."""
    return _linear_backward(grad, weight, by_column, scale, columns, lora_A, lora_B, scaling, added, need_x)


def linear_backward_reference(
    grad: Tensor,
    weight: Tensor,
    by_column: bool = True,
    scale: Tensor | None = None,
    columns: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    added: Tensor | None = None,
    need_x: bool = True,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`linear_backward`."""
    narrow = grad.new_empty(0)
    if lora_B is not None:
        narrow = grad @ (lora_B * scaling).to(grad.dtype).t()
    if not need_x:
        return grad.new_empty(0), narrow
    if scale is not None:
        wide = _rounded_in_blocks(grad.to(scale.dtype) * scale) @ weight.to(scale.dtype)
        dx = (wide if columns is None else wide * columns).to(grad.dtype)
    else:
        dx = grad @ (weight if by_column else weight.t())
    if lora_A is not None:
        dx = torch.addmm(dx, narrow, lora_A.to(grad.dtype).t())
    return (dx if added is None else dx + added), narrow


def _rounded_in_blocks(grad: Tensor) -> Tensor:
    """Rows of a gradient as bytes have them, with a scale for each ``BYTES_AT_ONCE`` numbers."""
    blocks = F.pad(grad, (0, -grad.shape[1] % BYTES_AT_ONCE)).unflatten(1, (-1, BYTES_AT_ONCE))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(step > 0, blocks / step, torch.zeros_like(blocks))
    return (torch.round(steps) * step).flatten(1)[:, : grad.shape[1]]


def factors_backward(
    x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """∂L/∂A = xᵀ·g (in, r) and ∂L/∂B = s·hᵀ·grad (r, out), both in fp32."""
    return _factors_backward(x, h, grad, narrow, scaling)


def factors_backward_reference(
    x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`factors_backward`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.t() @ narrow).to(wide), (h.t() @ grad).to(wide) * scaling


def class_gradient_(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """grad·W (M, d) of the gradient of a cross-entropy (M, classes), in int8 but for the targets' own part.

    Beside its target a row of such a gradient is of one sign, and most of it is far below its largest number:
    it is rounded with a scale for each ``BYTES_AT_ONCE`` classes, to 255 steps.

    Args:
        grad: (M, classes), overwritten. targets: (M), class indices.
        weight: (classes, d), rounded to bytes as it is read. scale: (classes), see :func:`scales_of_rows`.
    """
    return _class_gradient(grad, targets, weight, scale)


def class_gradient_reference(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The reference implementation of :func:`class_gradient_`; leaves ``grad`` as it is."""
    rows = torch.arange(len(targets))
    own = grad[rows, targets].to(scale.dtype)
    rest = grad.to(scale.dtype) * scale
    rest[rows, targets] = 0
    blocks = F.pad(rest, (0, -rest.shape[1] % BYTES_AT_ONCE)).unflatten(1, (-1, BYTES_AT_ONCE))
    high, low = blocks.amax(-1), blocks.amin(-1)
    step = torch.where(high >= -low, high, low) / 255
    steps = torch.where(step[..., None] != 0, blocks / step[..., None], torch.zeros_like(blocks))
    rounded = (torch.round(steps).clamp_(0, 255) * step[..., None]).flatten(1)[:, : rest.shape[1]]
    sums = rounded @ _rows_as_int8(weight, scale).to(scale.dtype)
    return (sums + own[:, None] * weight[targets].to(scale.dtype)).to(grad.dtype)


def can_round_classes(grad: Tensor, weight: Tensor) -> bool:
    """Whether the compiled kernel serves :func:`class_gradient_`, and is worth its while."""
    return _rounds_classes(grad, weight) and grad.shape[0] >= ROWS_FOR_BYTES


def _rounds_classes(grad: Tensor, weight: Tensor) -> bool:
    if not loader.serves(grad, weight) or grad.dtype != torch.bfloat16 or grad.shape[1] < 2:
        return False
    return grad.is_contiguous() and weight.is_contiguous()


def _compute_class_gradient(grad: Tensor, targets: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check_targets(targets, grad.shape[1])
    if not _rounds_classes(grad, weight):
        return class_gradient_reference(grad, targets, weight, scale)
    (rows, classes), width, targets = grad.shape, weight.shape[1], targets.contiguous()
    out = torch.empty(rows, width, dtype=grad.dtype)
    block_scales = torch.empty(rows, -(-classes // BYTES_AT_ONCE))
    loader.kernels().dw_class_gradient(
        rows, classes, width, grad.data_ptr(), targets.data_ptr(), weight.data_ptr(), scale.data_ptr(),
        block_scales.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _compute_quantized(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    if not loader.serves(x):
        return quantised_reference(x, columns)
    x = x.contiguous()
    steps, scales = _room_for_steps(x)
    loader.kernels().dw_quantize(
        loader.number(x.dtype), *x.shape, x.data_ptr(), loader.address(columns), steps.data_ptr(),
        scales.data_ptr(),
    )  # fmt: skip
    return steps, scales


def _room_for_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=torch.uint8), torch.empty(x.shape[0])


def _compute_linear(
    x, weight, by_column, scale, columns, bias, lora_A, lora_B, scaling, added, x_int8, x_scales
):  # type: ignore[no-untyped-def]
    if not can_multiply(x, weight, lora_A, by_column, scale is not None):
        return linear_reference(
            x, weight, by_column, scale, columns, bias, lora_A, lora_B, scaling, added, x_int8, x_scales
        )
    x = x.contiguous()
    added = None if added is None else added.contiguous()
    rows, width = x.shape
    out, rank = weight.shape[0] if by_column else weight.shape[1], 0
    y, h = torch.empty(rows, out, dtype=x.dtype), torch.empty(0, dtype=x.dtype)
    if lora_A is not None:
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        rank = lora_A.shape[1]
        h = torch.empty(rows, rank, dtype=x.dtype)
    make_steps = scale is not None and x_int8 is None
    if make_steps:
        x_int8, x_scales = _room_for_steps(x)
    loader.kernels().dw_linear(
        loader.number(x.dtype), rows, out, width, x.data_ptr(), loader.number(weight.dtype),
        weight.data_ptr(), by_column,
        loader.address(scale), loader.address(columns), loader.address(bias),
        bias is not None and bias.dtype == torch.float32, loader.address(lora_A), loader.address(lora_B),
        rank, scaling, loader.address(added), loader.address(x_int8), loader.address(x_scales), make_steps,
        y.data_ptr(), h.data_ptr(),
    )  # fmt: skip
    return y, h


def _compute_linear_backward(grad, weight, by_column, scale, columns, lora_A, lora_B, scaling, added, need_x):  # type: ignore[no-untyped-def]
    if not can_multiply(grad, weight, lora_A, by_column, scale is not None):
        return linear_backward_reference(
            grad, weight, by_column, scale, columns, lora_A, lora_B, scaling, added, need_x
        )
    grad = grad.contiguous()
    added = None if added is None else added.contiguous()
    rows, out = grad.shape
    width, rank = weight.shape[1] if by_column else weight.shape[0], 0
    narrow, dx = torch.empty(0, dtype=grad.dtype), torch.empty(0, dtype=grad.dtype)
    if lora_B is not None:
        lora_A, lora_B = lora_A.contiguous(), lora_B.contiguous()
        rank = lora_B.shape[0]
        narrow = torch.empty(rows, rank, dtype=grad.dtype)
    if need_x:
        dx = torch.empty(rows, width, dtype=grad.dtype)
    steps = scales = None
    if scale is not None and need_x:
        steps = torch.empty(grad.shape, dtype=torch.uint8)
        scales = torch.empty(rows, -(-out // BYTES_AT_ONCE))
    loader.kernels().dw_linear_backward(
        loader.number(grad.dtype), rows, out, width, grad.data_ptr(), weight.data_ptr(), by_column,
        loader.address(scale), loader.address(columns), loader.address(lora_A), loader.address(lora_B), rank,
        scaling, loader.address(added), loader.address(steps), loader.address(scales),
        dx.data_ptr() if need_x else None, narrow.data_ptr(),
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


_class_gradient = define(
    "class_gradient_(Tensor(a!) grad, Tensor targets, Tensor weight, Tensor scale) -> Tensor",
    _compute_class_gradient,
    lambda grad, targets, weight, scale: grad.new_empty(grad.shape[0], weight.shape[1]),
    lambda grad, targets, weight, scale: 2 * grad.shape[0] * weight.numel(),
)
_quantized = define(
    "quantized(Tensor x, Tensor? columns) -> (Tensor, Tensor)",
    _compute_quantized,
    lambda x, columns: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
_linear = define(
    "linear(Tensor x, Tensor weight, bool by_column, Tensor? scale, Tensor? columns, Tensor? bias, "
    "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? added, Tensor? x_bytes, Tensor? x_scales) "
    "-> (Tensor, Tensor)",
    _compute_linear,
    lambda x, weight, by_column, scale, columns, bias, lora_A, *_: (
        x.new_empty(x.shape[0], weight.shape[0] if by_column else weight.shape[1]),
        _no_update(x, lora_A),
    ),
    lambda x, weight, by_column, scale, columns, bias, lora_A, lora_B, *_: (
        2 * x.shape[0] * weight.numel() + _low_operations(x.shape[0], lora_A, lora_B)
    ),
)
_linear_backward = define(
    "linear_backward(Tensor grad, Tensor weight, bool by_column, Tensor? scale, Tensor? columns, "
    "Tensor? lora_A, Tensor? lora_B, float scaling, Tensor? added, bool need_x) -> (Tensor, Tensor)",
    _compute_linear_backward,
    lambda grad, weight, by_column, scale, columns, lora_A, lora_B, scaling, added, need_x: (
        grad.new_empty(grad.shape[0], weight.shape[1] if by_column else weight.shape[0])
        if need_x
        else grad.new_empty(0),
        _no_update(grad, lora_A),
    ),
    lambda grad, weight, by_column, scale, columns, lora_A, lora_B, scaling, added, need_x: (
        2 * grad.shape[0] * weight.numel() * need_x
        + _low_operations(grad.shape[0], lora_A if need_x else None, lora_B)
    ),
)
_factors_backward = define(
    "factors_backward(Tensor x, Tensor h, Tensor grad, Tensor narrow, float scaling) -> (Tensor, Tensor)",
    _compute_factors_backward,
    lambda x, h, grad, narrow, scaling: (
        x.new_empty(x.shape[1], narrow.shape[1], dtype=torch.float32),
        x.new_empty(h.shape[1], grad.shape[1], dtype=torch.float32),
    ),
    lambda x, h, grad, narrow, scaling: (
        2 * x.shape[0] * (narrow.shape[1] * x.shape[1] + h.shape[1] * grad.shape[1])
    ),
)
