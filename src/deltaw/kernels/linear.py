"""A frozen linear layer with its low-rank update as one product, forward and backward.

    y = x·Wᵀ + b + s·(x·A)·B + added

The update is added while the sums are in registers, so no wide tensor is written for it. W may be stored in
one of three ways, which :class:`Product` describes. Int8-quantized, it has a scale for each of its rows, and serves
forward and backward alike: forward, a row's scale belongs to an output; backward, it multiplies the gradient before
that is rounded to int8 itself, with a scale for each ``INT8_BLOCK`` of its numbers, since few of them are large.
SmoothQuant scales move outliers from inputs to weights before both are rounded (arXiv 2211.10438, eq. 3):
x·smooth_scales is rounded, and W holds the inverse. In blocks (``block_linear.py``), the compiled kernels read W
while they lay out a panel of 32 columns, so no more of W than a panel is ever there as numbers. Each is rounded to
bf16, whatever the type of x: that is what W is.

Knows tensors; not modules or training. Each function has a reference implementation in torch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.block_linear import FORMATS, BlockWeight
from deltaw.kernels.bounds import check_shape
from deltaw.kernels.operators import define, sums_dtype
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
from deltaw.kernels.structs import BlockData

# Bytes of de-quantized rows that torch multiplies with at a time.
REFERENCE_BYTES = 4 << 20


class Product(NamedTuple):
    """What rows are multiplied with: a frozen weight as it is stored, its bias and its low-rank update.

    Attributes:
        weight: (out, in) with ``by_column``, else (in, out); int8 weights are (out, in). Of a weight in blocks:
            their bytes, uint8 (out, bytes of a row).
        scale, smooth_scales: of a weight in int8: (out), and (in) or None. A bf16 weight with a ``scale`` is
            rounded to int8 as it is read, without SmoothQuant scales.
        bias: (out).
        lora_A, lora_B: (in, r) and (r, out), fp32.
        in_blocks: whether x is rounded to int8 with a scale for each ``INT8_BLOCK`` numbers, not for each row.
        format, columns, absmax, group_scale, offset: of a weight in blocks, see :class:`BlockWeight`.
    """

    weight: Tensor
    by_column: bool = True
    scale: Tensor | None = None
    smooth_scales: Tensor | None = None
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    in_blocks: bool = False
    format: str | None = None
    columns: int = 0
    absmax: Tensor | None = None
    group_scale: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def of_blocks(
        cls,
        weight: BlockWeight,
        bias: Tensor | None = None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
    ) -> Product:
        """The product with a weight in blocks."""
        data, *scales = weight.tensors
        of_rows = (True, None, None, bias, lora_A, lora_B, scaling, False)
        return cls(data, *of_rows, weight.format, weight.columns, *scales)

    @property
    def blocks(self) -> BlockWeight | None:
        """The weight, if it is in blocks."""
        if self.format is None:
            return None
        return BlockWeight(self.weight, self.format, self.columns, self.absmax, self.group_scale, self.offset)

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        if self.format is not None:
            return self.columns, self.weight.shape[0]
        first, second = self.weight.shape
        return (second, first) if self.by_column else (first, second)

    @property
    def number(self) -> int:
        """The kernels' own number for the type of the weight."""
        return loader.number(self.weight.dtype) if self.format is None else FORMATS[self.format].number

    def described(self) -> BlockData | None:
        """The kernels' struct of a weight in blocks, to be kept alive while they use it."""
        blocks = self.blocks
        return None if blocks is None else blocks.described()

    def address(self, described: BlockData | None) -> int:
        """Where the kernels find the weight, given what :meth:`described` returned."""
        return self.weight.data_ptr() if described is None else ctypes.addressof(described)


_FIELDS = len(Product._fields)


def product_of(args: tuple[Any, ...]) -> tuple[Product, tuple[Any, ...]]:
    """The description among the arguments of ``linear`` and ``linear_backward``, and what follows it."""
    return Product(*args[1 : _FIELDS + 1]), args[_FIELDS + 1 :]


def can_multiply(x: Tensor, of: Product) -> bool:
    """Whether the compiled kernel serves: types, layout, sizes that fill its groups of numbers, and that it
    is the kernels that compute such products at present."""
    int8, weight = of.scale is not None, of.weight
    if not loader.serves(x) or not loader.multiplies(loader.number(INT8 if int8 else x.dtype)):
        return False
    if of.format is not None:
        if weight.device.type != "cpu":
            return False
    elif (
        not (weight.dtype == INT8 or weight.dtype == x.dtype)
        or not weight.is_contiguous()
        or (int8 and weight.dtype != INT8 and (weight.dtype != torch.bfloat16 or not of.by_column))
    ):
        return False
    group = 4 if int8 else 4 // x.dtype.itemsize
    if weight.shape[0] % group or (of.format is None and weight.shape[1] % group):
        return False
    lora_A = of.lora_A
    return lora_A is None or (lora_A.dtype == torch.float32 and lora_A.shape[-1] % (4 // x.dtype.itemsize) == 0)


def linear(
    x: Tensor, of: Product, added: Tensor | None = None, x_int8: Tensor | None = None, x_scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (M, out) and h = x·A (M, r), which the backward wants (empty without an update).

    Args:
        x: (M, in).
        added: (M, out), such as the residual stream.
        x_int8, x_scales: what :func:`deltaw.kernels.quantize.quantized` made of x, where it was made before.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    inputs, outputs = of.sizes
    _check(x, of, inputs, (inputs, outputs))
    check_shape("what is added", added, x.shape[0], outputs)
    if of.scale is not None:
        check_shape("x in int8", x_int8, *x.shape)
        check_shape("the scales of x in int8", x_scales, *scales_shape(x, of.in_blocks))
    y, h = _linear(x, *of, added, x_int8, x_scales)
    return y, h


def linear_reference(
    x: Tensor, of: Product, added: Tensor | None = None, x_int8: Tensor | None = None, x_scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`linear`."""
    h, update, sums, blocks = x.new_empty(0), None, None, of.blocks
    if of.scale is not None:
        rounded, by = x_int8, x_scales
        if rounded is None or by is None:
            rounded, by = quantized_reference(x, of.smooth_scales, of.in_blocks)
        signed = of.weight if of.weight.dtype == INT8 else rows_as_int8(of.weight, of.scale)
        left = rounded.to(of.scale.dtype) - 128
        if of.in_blocks:
            left *= spread_scales(by, x.shape[1])
        sums = left @ signed.to(of.scale.dtype).t()
        del left  # the plan of memory counts on it
        sums *= of.scale if of.in_blocks else by[:, None] * of.scale
    if of.lora_A is not None and of.lora_B is not None:
        h = x @ of.lora_A.to(x.dtype)
        if blocks is None:
            update = h @ (of.lora_B * of.scaling).to(x.dtype)
    if blocks is not None:
        y = x.new_empty(x.shape[0], of.sizes[1])
        factor = None if of.lora_B is None else (of.lora_B * of.scaling).to(x.dtype)
        for rows, values in _some_rows(blocks, x.dtype):
            y[:, rows] = plus_product(None if factor is None else h @ factor[:, rows], x, values.t())
    elif sums is not None:
        y = (sums if update is None else sums.add_(update)).to(x.dtype)
    else:
        y = plus_product(update, x, of.weight.t() if of.by_column else of.weight)
    if of.bias is not None:
        y = y + of.bias.to(y.dtype)
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
    grad: Tensor, of: Product, added: Tensor | None = None, need_x: bool = True, in_int8: bool = False
) -> tuple[Tensor, Tensor]:
    """∂L/∂x (M, in) = grad·W + g·Aᵀ + added, and g = grad·(s·B)ᵀ (M, r); each empty where there is none.

    Args:
        in_int8: whether grad·W of a bf16 weight is computed in int8: the weight is rounded as it is read,
            with a scale for each of the rows that it is stored in, and the gradient with one for each
            ``INT8_BLOCK`` numbers.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    inputs, outputs = of.sizes
    _check(grad, of, outputs, (inputs, outputs))
    check_shape("what is added", added, grad.shape[0], inputs)
    dx, narrow = _linear_backward(grad, *of, added, need_x, in_int8)
    return dx, narrow


def rounds_gradients(grad: Tensor, of: Product) -> bool:
    """Whether this process computes the gradient of such a layer's input in int8, though its weight is not:
    ``in_int8`` of :func:`linear_backward`."""
    return loader.arithmetic().int8_gradients and _can_round(grad, of)


def _can_round(grad: Tensor, of: Product) -> bool:
    """Whether the compiled kernel rounds the two sides of grad·W, which are bf16, as it reads them."""
    return (
        of.weight.dtype == grad.dtype == torch.bfloat16
        and can_multiply(grad, of)
        and loader.multiplies(loader.number(INT8))
        and not any(size % 4 for size in of.weight.shape)
    )


def linear_backward_reference(
    grad: Tensor, of: Product, added: Tensor | None = None, need_x: bool = True, in_int8: bool = False
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :func:`linear_backward`."""
    narrow = grad.new_empty(0)
    if of.lora_B is not None:
        narrow = grad @ (of.lora_B * of.scaling).to(grad.dtype).t()
    if not need_x:
        return grad.new_empty(0), narrow
    wide, blocks = None, of.blocks
    if of.scale is not None:
        wide = rounded_in_blocks(grad.to(of.scale.dtype) * of.scale) @ of.weight.to(of.scale.dtype)
        if of.smooth_scales is not None:
            wide *= of.smooth_scales
    elif in_int8:
        signed, scale = quantized_rows(of.weight)
        wide = grad.float() * scale if of.by_column else grad.float()
        wide = rounded_in_blocks(wide) @ (signed if of.by_column else signed.t()).float()
        if not of.by_column:
            wide *= scale
    update = None if of.lora_A is None else narrow @ of.lora_A.to(grad.dtype).t()
    if blocks is not None:
        sums = torch.zeros(grad.shape[0], of.columns, dtype=sums_dtype(grad), device=grad.device)
        for rows, values in _some_rows(blocks, grad.dtype):
            sums += plus_product(update, grad[:, rows], values)
            update = None
        dx = sums.to(grad.dtype)
    elif wide is not None:
        dx = (wide if update is None else wide.add_(update)).to(grad.dtype)
    else:
        dx = plus_product(update, grad, of.weight if of.by_column else of.weight.t())
    return (dx if added is None else dx + added), narrow


def rows_at_once(outputs: int, inputs: int) -> int:
    """Rows of a weight in blocks that the reference de-quantizes at a time: as many as REFERENCE_BYTES hold."""
    return min(outputs, max(1, REFERENCE_BYTES // (4 * inputs)))


def _some_rows(weight: BlockWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A weight in blocks some rows at a time: which, and their values, which are numbers of bf16."""
    outputs, inputs = weight.shape
    most = rows_at_once(outputs, inputs)
    for first in range(0, outputs, most):
        rows = slice(first, min(outputs, first + most))
        yield rows, weight.dequantized(torch.bfloat16, rows.start, rows.stop).to(dtype)


def _check(left: Tensor, of: Product, width: int, sizes: tuple[int, int]) -> None:
    """That a product of ``left`` (M, width) with a weight of these sizes, and the factors on both sides, is one."""
    if left.dim() != 2:
        raise ValueError(f"a product is of two matrices, not of {tuple(left.shape)} and {tuple(of.weight.shape)}")
    inputs, outputs = sizes
    check_shape("the left side", left, left.shape[0], width)
    check_shape("the weight's scales", of.scale, outputs)
    check_shape("the SmoothQuant scales", of.smooth_scales, inputs)
    check_shape("the bias", of.bias, outputs)
    if (of.lora_A is None) != (of.lora_B is None):
        raise ValueError("a low-rank update has two factors, or there is none")
    if of.lora_A is not None:
        check_shape("a factor", of.lora_A, inputs, of.lora_A.shape[-1])
        check_shape("a factor", of.lora_B, of.lora_A.shape[-1], outputs)


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
    wide = sums_dtype(x)
    return (x.t() @ narrow).to(wide), (h.t() @ grad).to(wide) * scaling


def _are(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - all() takes twice as long, and there are many small products
        if tensor is not None and tensor.dtype != dtype:
            return False
    return True


def _compiled(left: Tensor, of: Product, added: Tensor | None, scales: Tensor | None = None) -> bool:
    """Whether the compiled kernel takes the product's tensors, what is added to it, and scales of the left side."""
    if not can_multiply(left, of) or not _are(left.dtype, added):
        return False
    return _are(torch.float32, of.scale, of.smooth_scales, of.lora_B, scales)


def _laid_out(of: Product) -> Product:
    """As the kernels read it: numbers side by side, rows one after another."""
    for tensor in (of.scale, of.smooth_scales, of.bias, of.lora_A, of.lora_B):  # the weight is, if it is served
        if tensor is not None and not tensor.is_contiguous():
            break
    else:
        return of
    return Product._make(t.contiguous() if isinstance(t, Tensor) else t for t in of)


def _compute_linear(*args: Any) -> tuple[Tensor, Tensor]:
    x, (of, (added, x_int8, x_scales)) = args[0], product_of(args)
    compiled = _compiled(x, of, added, x_scales) and (_are(x.dtype, of.bias) or _are(torch.float32, of.bias))
    compiled = compiled and (of.scale is None or of.in_blocks or x.shape[1] <= LONGEST_SUM)
    if not compiled or not _are(torch.uint8, x_int8):
        return linear_reference(x, of, added, x_int8, x_scales)
    x, of = x.contiguous(), _laid_out(of)
    added = None if added is None else added.contiguous()
    if x_int8 is not None and x_scales is not None:
        x_int8, x_scales = x_int8.contiguous(), x_scales.contiguous()
    (rows, width), (_, out) = x.shape, of.sizes
    y, h = torch.empty(rows, out, dtype=x.dtype), _narrow_like(x, of)
    quantize = of.scale is not None and x_int8 is None
    if quantize:
        x_int8, x_scales = room_for_int8(x, of.in_blocks)
    described = of.described()
    loader.kernels().dw_linear(
        loader.number(x.dtype), rows, out, width, x.data_ptr(), of.number, of.address(described), of.by_column,
        loader.address(of.scale), loader.address(of.smooth_scales), loader.address(of.bias),
        of.bias is not None and of.bias.dtype == torch.float32, loader.address(of.lora_A),
        loader.address(of.lora_B), h.shape[-1], of.scaling, loader.address(added), loader.address(x_int8),
        loader.address(x_scales), of.in_blocks, quantize, y.data_ptr(), h.data_ptr(),
    )  # fmt: skip
    return y, h


def _compute_linear_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad, (of, (added, need_x, in_int8)) = args[0], product_of(args)
    if not _compiled(grad, of, added) or (in_int8 and not _can_round(grad, of)):
        return linear_backward_reference(grad, of, added, need_x, in_int8)
    grad, of, added = grad.contiguous(), _laid_out(of), None if added is None else added.contiguous()
    (rows, out), (width, _) = grad.shape, of.sizes
    narrow = _narrow_like(grad, of)
    dx = torch.empty((rows, width) if need_x else (0,), dtype=grad.dtype)
    rounded = scales = None
    if (of.scale is not None or in_int8) and need_x:
        rounded, scales = room_for_int8(grad, True)
    described = of.described()
    loader.kernels().dw_linear_backward(
        loader.number(grad.dtype), rows, out, width, grad.data_ptr(), of.number, of.address(described),
        of.by_column, loader.address(of.scale), loader.address(of.smooth_scales), loader.address(of.lora_A),
        loader.address(of.lora_B), narrow.shape[-1], of.scaling, loader.address(added), loader.address(rounded),
        loader.address(scales), dx.data_ptr() if need_x else None, narrow.data_ptr(),
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


def _narrow_like(x: Tensor, of: Product) -> Tensor:
    """Room for x·A, or for its gradient."""
    return x.new_empty(0) if of.lora_A is None else x.new_empty(x.shape[0], of.lora_A.shape[1])


def _shapes(*args: Any) -> tuple[Tensor, Tensor]:
    x, (of, _) = args[0], product_of(args)
    return x.new_empty(x.shape[0], of.sizes[1]), _narrow_like(x, of)


def _shapes_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad, (of, (_, need_x, _)) = args[0], product_of(args)
    return grad.new_empty((grad.shape[0], of.sizes[0]) if need_x else 0), _narrow_like(grad, of)


def _operations(*args: Any) -> int:
    of, _ = product_of(args)
    factors = 0 if of.lora_A is None or of.lora_B is None else of.lora_A.numel() + of.lora_B.numel()
    return 2 * args[0].shape[0] * (math.prod(of.sizes) + factors)


def _operations_backward(*args: Any) -> int:
    _, need_x, _ = product_of(args)[1]
    return _operations(*args) * need_x


_PRODUCT = (
    "Tensor weight, bool by_column, Tensor? scale, Tensor? smooth_scales, Tensor? bias, Tensor? lora_A, "
    "Tensor? lora_B, float scaling, bool in_blocks, str? format, int columns, Tensor? absmax, "
    "Tensor? group_scale, Tensor? offset"
)
_linear = define(
    f"linear(Tensor x, {_PRODUCT}, Tensor? added, Tensor? x_int8, Tensor? x_scales) -> (Tensor, Tensor)",
    _compute_linear,
    _shapes,
    _operations,
)
_linear_backward = define(
    f"linear_backward(Tensor grad, {_PRODUCT}, Tensor? added, bool need_x, bool in_int8) -> (Tensor, Tensor)",
    _compute_linear_backward,
    _shapes_backward,
    _operations_backward,
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
