"""Frozen linear layer with a low-rank update as one product, forward and backward.

    y = x·Wᵀ + b + s·(x·A)·B + addend

The update is added while sums are in registers, so no full-width tensor is written for it. :class:`LinearProduct`
describes the three ways to store W:

- fp32 or bf16.
- int8 with a scale per row. In the forward pass a row's scale belongs to an output. In the backward pass it multiplies
  the gradient, which is then quantized with a scale per ``INT8_BLOCK`` numbers, since few of them are large.
  SmoothQuant
  scales move outliers from inputs to weights (arXiv 2211.10438, eq. 3): x·smooth_scales is quantized, and W contains
  the
  inverse scales.
- blocks (``block_linear.py``). The compiled kernels decode W while they pack a panel of 32 columns, so at most a panel
  is in memory in decoded form. Decoded weights are rounded to bf16, regardless of the type of x.

Each function has a reference implementation in torch.
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
from deltaw.kernels.loader import BlockData
from deltaw.kernels.operators import accumulation_dtype, check_shape, define
from deltaw.kernels.quantize import (
    INT8,
    MAX_SUM_LENGTH,
    empty_int8,
    expand_scales,
    fake_quantize_blocks,
    quantize_activations_reference,
    quantize_rows,
    round_rows,
    scales_shape,
)

# Bytes of dequantized rows per chunk in the reference implementation.
REFERENCE_BYTES = 4 << 20


class LinearProduct(NamedTuple):
    """Right side of a product: a stored frozen weight, its bias and its low-rank update.

    Attributes:
        weight: (out, in) if ``by_column``, else (in, out). int8 weights are (out, in). For weights in blocks, their
            bytes: uint8 (out, bytes per row).
        by_column: True if ``weight`` is (out, in).
        scale: (out) scales of an int8 weight. A bf16 weight with a scale is quantized to int8 as it is read.
        smooth_scales: (in) SmoothQuant scales of an int8 weight, or None.
        bias: (out) or None.
        lora_A: (in, r) fp32 or None.
        lora_B: (r, out) fp32 or None.
        scaling: Factor of the update.
        in_blocks: Quantize x with a scale per ``INT8_BLOCK`` numbers instead of per row.
        format: Block format; see :class:`BlockWeight`. None for other weights.
        columns: Number of inputs of a weight in blocks.
        absmax: See :class:`BlockWeight`.
        group_scale: See :class:`BlockWeight`.
        offset: See :class:`BlockWeight`.
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
    def from_blocks(
        cls,
        weight: BlockWeight,
        bias: Tensor | None = None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float = 1.0,
    ) -> LinearProduct:
        """Create the product with a weight in blocks."""
        data, *scales = weight.tensors
        options = (True, None, None, bias, lora_A, lora_B, scaling, False)
        return cls(data, *options, weight.format, weight.columns, *scales)

    @property
    def blocks(self) -> BlockWeight | None:
        """The weight if it is in blocks, else None."""
        if self.format is None:
            return None
        return BlockWeight(self.weight, self.format, self.columns, self.absmax, self.group_scale, self.offset)

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of inputs and outputs."""
        if self.format is not None:
            return self.columns, self.weight.shape[0]
        first, second = self.weight.shape
        return (second, first) if self.by_column else (first, second)

    @property
    def number(self) -> int:
        """The kernels' code of the weight's type."""
        return loader.dtype_code(self.weight.dtype) if self.format is None else FORMATS[self.format].number

    def as_struct(self) -> BlockData | None:
        """Return the kernels' struct of a weight in blocks, or None. The caller must keep it alive during the call."""
        blocks = self.blocks
        return None if blocks is None else blocks.as_struct()

    def address(self, block_data: BlockData | None) -> int:
        """Return the address of the weight, given the result of :meth:`as_struct`."""
        return self.weight.data_ptr() if block_data is None else ctypes.addressof(block_data)


_FIELDS = len(LinearProduct._fields)


def split_arguments(args: tuple[Any, ...]) -> tuple[LinearProduct, tuple[Any, ...]]:
    """Split the arguments of the ``linear`` and ``linear_backward`` operators into the product and the arguments after
    it.
    """
    return LinearProduct(*args[1 : _FIELDS + 1]), args[_FIELDS + 1 :]


def can_multiply(x: Tensor, product: LinearProduct) -> bool:
    """True if the active kernels compute this product: supported types, layout and sizes."""
    int8 = product.scale is not None
    weight = product.weight
    if not loader.supports(x) or not loader.multiplies(loader.dtype_code(INT8 if int8 else x.dtype)):
        return False
    if product.format is not None:
        if weight.device.type != "cpu":
            return False
    elif (
        not (weight.dtype == INT8 or weight.dtype == x.dtype)
        or not weight.is_contiguous()
        or (int8 and weight.dtype != INT8 and (weight.dtype != torch.bfloat16 or not product.by_column))
    ):
        return False
    group = 4 if int8 else 4 // x.dtype.itemsize
    if weight.shape[0] % group or (product.format is None and weight.shape[1] % group):
        return False
    lora_A = product.lora_A
    return lora_A is None or (lora_A.dtype == torch.float32 and lora_A.shape[-1] % (4 // x.dtype.itemsize) == 0)


def linear(
    x: Tensor,
    product: LinearProduct,
    addend: Tensor | None = None,
    x_int8: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the product.

    Args:
        x: (M, in).
        product: Right side of the product.
        addend: (M, out) addend, such as the residual stream.
        x_int8: Result of :func:`deltaw.kernels.quantize.quantize_activations` for x, if already computed.
        x_scales: Scales of ``x_int8``.

    Returns:
        y (M, out), and h = x·A (M, r) for the backward pass (empty without an update).

    Raises:
        ValueError: if shapes do not match.
    """
    inputs, outputs = product.sizes
    _check_shapes(x, product, inputs, (inputs, outputs))
    check_shape("the addend", addend, x.shape[0], outputs)
    if product.scale is not None:
        check_shape("x in int8", x_int8, *x.shape)
        check_shape("the scales of x in int8", x_scales, *scales_shape(x, product.in_blocks))
    return _linear(x, *product, addend, x_int8, x_scales)


def linear_reference(
    x: Tensor,
    product: LinearProduct,
    addend: Tensor | None = None,
    x_int8: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reference implementation of :func:`linear`."""
    h = x.new_empty(0)
    update = None
    sums = None
    blocks = product.blocks
    if product.scale is not None:
        quantized = x_int8
        activation_scales = x_scales
        if quantized is None or activation_scales is None:
            quantized, activation_scales = quantize_activations_reference(x, product.smooth_scales, product.in_blocks)
        int8_weight = product.weight if product.weight.dtype == INT8 else round_rows(product.weight, product.scale)
        unscaled = quantized.to(product.scale.dtype) - 128
        if product.in_blocks:
            unscaled *= expand_scales(activation_scales, x.shape[1])
        sums = unscaled @ int8_weight.to(product.scale.dtype).t()
        del unscaled  # the memory plan relies on this
        sums *= product.scale if product.in_blocks else activation_scales[:, None] * product.scale
    if product.lora_A is not None and product.lora_B is not None:
        h = x @ product.lora_A.to(x.dtype)
        if blocks is None:
            update = h @ _scaled_B(product, x.dtype)
    if blocks is not None:
        y = x.new_empty(x.shape[0], product.sizes[1])
        factor = None if product.lora_B is None else _scaled_B(product, x.dtype)
        for rows, values in _row_chunks(blocks, x.dtype):
            y[:, rows] = plus_product(None if factor is None else h @ factor[:, rows], x, values.t())
    elif sums is not None:
        y = (sums if update is None else sums.add_(update)).to(x.dtype)
    else:
        y = plus_product(update, x, product.weight.t() if product.by_column else product.weight)
    if product.bias is not None:
        y = y + product.bias.to(y.dtype)
    return (y if addend is None else y + addend), h


def _scaled_B(product: LinearProduct, dtype: torch.dtype) -> Tensor:
    assert product.lora_B is not None
    return (product.lora_B if product.scaling == 1.0 else product.lora_B * product.scaling).to(dtype)


def plus_product(update: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return update + left·right, rounded once. Overwrites ``update``.

    Updates are small. If the product were rounded to bf16 first, more than half of an update could be lost: it is less
    than half of the last digit, and rounding the sum discards it systematically.
    """
    if update is None:
        return left @ right
    return torch.addmm(update, left, right) if torch.is_grad_enabled() else update.addmm_(left, right)


def linear_backward(
    grad: Tensor, product: LinearProduct, addend: Tensor | None = None, need_x: bool = True, in_int8: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute gradients of the input and of h.

    Args:
        grad: (M, out) gradient of y.
        product: Right side of the product.
        addend: (M, in) addend of the input gradient.
        need_x: Compute the input gradient.
        in_int8: Compute grad·W of a bf16 weight in int8. The weight is quantized as it is read with a scale per stored
            row, the gradient with a scale per ``INT8_BLOCK`` numbers.

    Returns:
        ∂L/∂x (M, in) = grad·W + g·Aᵀ + addend, and g = grad·(s·B)ᵀ (M, r). Each is empty if not computed.

    Raises:
        ValueError: if shapes do not match.
    """
    inputs, outputs = product.sizes
    _check_shapes(grad, product, outputs, (inputs, outputs))
    check_shape("the addend", addend, grad.shape[0], inputs)
    return _linear_backward(grad, *product, addend, need_x, in_int8)


def uses_int8_gradients(grad: Tensor, product: LinearProduct) -> bool:
    """True if this process computes the input gradient of such a bf16 layer in int8; see :func:`linear_backward`."""
    return loader.arithmetic().int8_gradients and _can_use_int8(grad, product)


def _can_use_int8(grad: Tensor, product: LinearProduct) -> bool:
    """True if the compiled kernel supports grad·W of bf16 tensors in int8."""
    return (
        product.weight.dtype == grad.dtype == torch.bfloat16
        and can_multiply(grad, product)
        and loader.multiplies(loader.dtype_code(INT8))
        and not any(size % 4 for size in product.weight.shape)
    )


def linear_backward_reference(
    grad: Tensor, product: LinearProduct, addend: Tensor | None = None, need_x: bool = True, in_int8: bool = False
) -> tuple[Tensor, Tensor]:
    """Reference implementation of :func:`linear_backward`."""
    narrow = grad.new_empty(0)
    if product.lora_B is not None:
        narrow = grad @ _scaled_B(product, grad.dtype).t()
    if not need_x:
        return grad.new_empty(0), narrow
    scaled_sums = None
    blocks = product.blocks
    if product.scale is not None:
        dtype = product.scale.dtype
        scaled_sums = fake_quantize_blocks(grad.to(dtype) * product.scale) @ product.weight.to(dtype)
        if product.smooth_scales is not None:
            scaled_sums *= product.smooth_scales
    elif in_int8:
        weight, scale = quantize_rows(product.weight)
        scaled_sums = grad.float() * scale if product.by_column else grad.float()
        scaled_sums = fake_quantize_blocks(scaled_sums) @ (weight if product.by_column else weight.t()).float()
        if not product.by_column:
            scaled_sums *= scale
    update = None if product.lora_A is None else narrow @ product.lora_A.to(grad.dtype).t()
    if blocks is not None:
        sums = torch.zeros(grad.shape[0], product.columns, dtype=accumulation_dtype(grad), device=grad.device)
        for rows, values in _row_chunks(blocks, grad.dtype):
            sums += plus_product(update, grad[:, rows], values)
            update = None
        dx = sums.to(grad.dtype)
    elif scaled_sums is not None:
        dx = (scaled_sums if update is None else scaled_sums.add_(update)).to(grad.dtype)
    else:
        dx = plus_product(update, grad, product.weight if product.by_column else product.weight.t())
    return (dx if addend is None else dx + addend), narrow


def reference_chunk_rows(outputs: int, inputs: int) -> int:
    """Return the rows of a weight in blocks that the reference implementation dequantizes per chunk."""
    return min(outputs, max(1, REFERENCE_BYTES // (4 * inputs)))


def _row_chunks(weight: BlockWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows of a weight in blocks and their values, rounded to bf16."""
    outputs, inputs = weight.shape
    chunk_rows = reference_chunk_rows(outputs, inputs)
    for first in range(0, outputs, chunk_rows):
        rows = slice(first, min(outputs, first + chunk_rows))
        yield rows, weight.dequantized(torch.bfloat16, rows.start, rows.stop).to(dtype)


def _check_shapes(left: Tensor, product: LinearProduct, width: int, sizes: tuple[int, int]) -> None:
    """Check the shapes of a product of ``left`` (M, width) with a weight of these sizes and its low-rank factors."""
    if left.dim() != 2:
        raise ValueError(f"expected two matrices, got shapes {tuple(left.shape)} and {tuple(product.weight.shape)}")
    inputs, outputs = sizes
    check_shape("the left side", left, left.shape[0], width)
    check_shape("the weight's scales", product.scale, outputs)
    check_shape("the SmoothQuant scales", product.smooth_scales, inputs)
    check_shape("the bias", product.bias, outputs)
    if (product.lora_A is None) != (product.lora_B is None):
        raise ValueError("lora_A and lora_B must be given together")
    if product.lora_A is not None:
        check_shape("a factor", product.lora_A, inputs, product.lora_A.shape[-1])
        check_shape("a factor", product.lora_B, product.lora_A.shape[-1], outputs)


def factors_backward(x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the fp32 gradients ∂L/∂A = xᵀ·g (in, r) and ∂L/∂B = s·hᵀ·grad (r, out)."""
    rows, rank = h.shape
    check_shape("x", x, rows, x.shape[-1])
    check_shape("the gradient", grad, rows, grad.shape[-1])
    check_shape("the gradient of h", narrow, rows, rank)
    return _factors_backward(x, h, grad, narrow, scaling)


def factors_backward_reference(
    x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Reference implementation of :func:`factors_backward`."""
    grad_A, grad_B = factor_products(x, h, grad, narrow, scaling)
    return grad_A.to(accumulation_dtype(x)), grad_B.to(accumulation_dtype(x))


def factor_products(x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return :func:`factors_backward` in the type of x, from one product each."""
    return x.t() @ narrow, torch.addmm(grad.new_empty(1), h.t(), grad, beta=0, alpha=scaling)


def _have_dtype(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    for tensor in tensors:  # noqa: SIM110 - all() takes twice as long, which matters for small products
        if tensor is not None and tensor.dtype != dtype:
            return False
    return True


def _compiled(left: Tensor, product: LinearProduct, addend: Tensor | None, scales: Tensor | None = None) -> bool:
    """True if the compiled kernel supports the tensors of a product."""
    if not can_multiply(left, product) or not _have_dtype(left.dtype, addend):
        return False
    return _have_dtype(torch.float32, product.scale, product.smooth_scales, product.lora_B, scales)


def _contiguous_tensors(product: LinearProduct) -> LinearProduct:
    """Return the product with contiguous tensors. A supported weight is already contiguous."""
    for tensor in (product.scale, product.smooth_scales, product.bias, product.lora_A, product.lora_B):
        if tensor is not None and not tensor.is_contiguous():
            break
    else:
        return product
    return LinearProduct._make(t.contiguous() if isinstance(t, Tensor) else t for t in product)


def _empty_rank_rows(x: Tensor, product: LinearProduct) -> Tensor:
    """Return an uninitialized tensor for x·A or its gradient."""
    return x.new_empty(0) if product.lora_A is None else x.new_empty(x.shape[0], product.lora_A.shape[1])


def _shapes(*args: Any) -> tuple[Tensor, Tensor]:
    x = args[0]
    product, _ = split_arguments(args)
    return x.new_empty(x.shape[0], product.sizes[1]), _empty_rank_rows(x, product)


def _shapes_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad = args[0]
    product, (_, need_x, _) = split_arguments(args)
    return grad.new_empty((grad.shape[0], product.sizes[0]) if need_x else 0), _empty_rank_rows(grad, product)


def _operations(*args: Any) -> int:
    product, _ = split_arguments(args)
    factors = 0 if product.lora_A is None or product.lora_B is None else product.lora_A.numel() + product.lora_B.numel()
    return 2 * args[0].shape[0] * (math.prod(product.sizes) + factors)


def _operations_backward(*args: Any) -> int:
    _, need_x, _ = split_arguments(args)[1]
    return _operations(*args) * need_x


_PRODUCT = (
    "Tensor weight, bool by_column, Tensor? scale, Tensor? smooth_scales, Tensor? bias, Tensor? lora_A, "
    "Tensor? lora_B, float scaling, bool in_blocks, str? format, int columns, Tensor? absmax, "
    "Tensor? group_scale, Tensor? offset"
)


@define(
    f"linear(Tensor x, {_PRODUCT}, Tensor? addend, Tensor? x_int8, Tensor? x_scales) -> (Tensor, Tensor)",
    _shapes,
    _operations,
)
def _linear(*args: Any) -> tuple[Tensor, Tensor]:
    x = args[0]
    product, (addend, x_int8, x_scales) = split_arguments(args)
    bias_fits = _have_dtype(x.dtype, product.bias) or _have_dtype(torch.float32, product.bias)
    compiled = _compiled(x, product, addend, x_scales) and bias_fits
    compiled = compiled and (product.scale is None or product.in_blocks or x.shape[1] <= MAX_SUM_LENGTH)
    if not compiled or not _have_dtype(torch.uint8, x_int8):
        return linear_reference(x, product, addend, x_int8, x_scales)
    x = x.contiguous()
    product = _contiguous_tensors(product)
    addend = None if addend is None else addend.contiguous()
    if x_int8 is not None and x_scales is not None:
        x_int8 = x_int8.contiguous()
        x_scales = x_scales.contiguous()
    rows, width = x.shape
    _, out = product.sizes
    y = torch.empty(rows, out, dtype=x.dtype)
    h = _empty_rank_rows(x, product)
    quantize = product.scale is not None and x_int8 is None
    if quantize:
        x_int8, x_scales = empty_int8(x, product.in_blocks)
    block_data = product.as_struct()
    loader.kernels().dw_linear(
        loader.dtype_code(x.dtype), rows, out, width, x.data_ptr(), product.number, product.address(block_data),
        product.by_column, loader.address(product.scale), loader.address(product.smooth_scales),
        loader.address(product.bias), product.bias is not None and product.bias.dtype == torch.float32,
        loader.address(product.lora_A), loader.address(product.lora_B), h.shape[-1], product.scaling,
        loader.address(addend), loader.address(x_int8), loader.address(x_scales), product.in_blocks, quantize,
        y.data_ptr(), h.data_ptr(),
    )  # fmt: skip
    return y, h


@define(
    f"linear_backward(Tensor grad, {_PRODUCT}, Tensor? addend, bool need_x, bool in_int8) -> (Tensor, Tensor)",
    _shapes_backward,
    _operations_backward,
)
def _linear_backward(*args: Any) -> tuple[Tensor, Tensor]:
    grad = args[0]
    product, (addend, need_x, in_int8) = split_arguments(args)
    if not _compiled(grad, product, addend) or (in_int8 and not _can_use_int8(grad, product)):
        return linear_backward_reference(grad, product, addend, need_x, in_int8)
    grad = grad.contiguous()
    product = _contiguous_tensors(product)
    addend = None if addend is None else addend.contiguous()
    rows, out = grad.shape
    width, _ = product.sizes
    narrow = _empty_rank_rows(grad, product)
    dx = torch.empty((rows, width) if need_x else (0,), dtype=grad.dtype)
    quantized = scales = None
    if (product.scale is not None or in_int8) and need_x:
        quantized, scales = empty_int8(grad, True)
    block_data = product.as_struct()
    loader.kernels().dw_linear_backward(
        loader.dtype_code(grad.dtype), rows, out, width, grad.data_ptr(), product.number, product.address(block_data),
        product.by_column, loader.address(product.scale), loader.address(product.smooth_scales),
        loader.address(product.lora_A), loader.address(product.lora_B), narrow.shape[-1], product.scaling,
        loader.address(addend), loader.address(quantized), loader.address(scales), dx.data_ptr() if need_x else None,
        narrow.data_ptr(),
    )  # fmt: skip
    return dx, narrow


@define(
    "factors_backward(Tensor x, Tensor h, Tensor grad, Tensor narrow, float scaling) -> (Tensor, Tensor)",
    lambda x, h, grad, narrow, scaling: (
        x.new_empty(x.shape[1], narrow.shape[1], dtype=torch.float32),
        x.new_empty(h.shape[1], grad.shape[1], dtype=torch.float32),
    ),
    lambda x, h, grad, narrow, scaling: 2 * x.shape[0] * (narrow.shape[1] * x.shape[1] + h.shape[1] * grad.shape[1]),
)
def _factors_backward(x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    if not loader.supports(x, h, grad, narrow):
        return factors_backward_reference(x, h, grad, narrow, scaling)
    x = x.contiguous()
    h = h.contiguous()
    grad = grad.contiguous()
    narrow = narrow.contiguous()
    rows, width, out, rank = *x.shape, grad.shape[1], h.shape[1]
    grad_A = torch.empty(width, rank)
    grad_B = torch.empty(rank, out)
    loader.kernels().dw_factors_backward(
        loader.dtype_code(x.dtype), rows, width, out, rank, x.data_ptr(), h.data_ptr(), grad.data_ptr(),
        narrow.data_ptr(), scaling, grad_A.data_ptr(), grad_B.data_ptr(),
    )  # fmt: skip
    return grad_A, grad_B
