"""Temporary memory that operators allocate and free internally.

A dispatch mode sees only inputs and outputs of operators. According to the allocator, most of torch's CPU kernels
allocate no other memory. This module lists the exceptions that matter in training. It omits the block buffers of
oneDNN's bf16 products (about 0.1 to 2 MB per thread, depending on processor and shape) and buffers of a few kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from deltaw.kernels import attention, experts, head_gradient, loader, quantize, recurrence, rows, short_convolution
from deltaw.kernels.linear import LinearProduct, reference_chunk_rows, split_arguments
from deltaw.kernels.quantize import INT8_BLOCK
from deltaw.kernels.torch_private import FLASH_BACKWARD, FLASH_FORWARD

# Each thread of the compiled kernels allocates temporary memory from its arena. Arenas are not tensors, so the tensor
# allocator does not count them, and they stay allocated between calls. The size differs between processors, so the
# kernels report it. Tensors that an operator allocates in Python are listed separately (TENSORS).


# Importing these modules registers the operators.
assert attention and experts and head_gradient and recurrence and rows and short_convolution

_ops = torch.ops.deltaw
Arguments: TypeAlias = tuple[Any, ...]
Rule: TypeAlias = Callable[[Arguments], int]


def _linear_arena_bytes(args: Arguments, in_blocks: bool, backward: bool, need_x: bool, in_int8: bool) -> int:
    x = args[0]
    product, _ = split_arguments(args)
    if not _uses_compiled_product(x, product.scale):
        return 0
    inputs, outputs = product.sizes
    rank = 0 if product.lora_A is None else product.lora_A.shape[1]
    return loader.kernels().dw_linear_scratch_size(
        loader.dtype_code(x.dtype), x.shape[0], outputs, inputs, product.number, product.by_column,
        product.scale is not None or in_int8, in_blocks, rank, backward, need_x,
    )  # fmt: skip


def _linear_arena(args: Arguments) -> int:
    return _linear_arena_bytes(args, split_arguments(args)[0].in_blocks, False, False, False)


def _linear_backward_arena(args: Arguments) -> int:
    product, (_, need_x, in_int8) = split_arguments(args)
    return _linear_arena_bytes(args, product.format is None, True, need_x, in_int8)


def _int8_bytes(x: Tensor, in_blocks: bool) -> int:
    return x.numel() + 4 * math.prod(quantize.scales_shape(x, in_blocks))


def _factors_backward_arena(args: Arguments) -> int:
    x, h = args[:2]
    return loader.kernels().dw_factors_scratch_size(loader.dtype_code(x.dtype), *h.shape)


def _class_gradient_arena(args: Arguments) -> int:
    grad, _, weight = args[:3]
    return loader.kernels().dw_class_gradient_scratch_size(*grad.shape, weight.shape[1])


def _class_scales(args: Arguments) -> int:
    """Return the bytes of one scale per block of classes."""
    rows, classes = args[0].shape
    return rows * -(-classes // INT8_BLOCK) * 4


def _head_gradient_arena(args: Arguments) -> int:
    return loader.kernels().dw_head_gradient_scratch_size(*args[2].shape)


def _cross_entropy_arena(args: Arguments) -> int:
    logits = args[0]
    with_gradient = args[5]
    return torch.get_num_threads() * -(-logits.shape[1] // 16) * 16 * 4 if with_gradient else 0


def _rows_per_expert(x: Tensor, index: Tensor, count: int) -> int:
    """Return the rows of the products of a group, if no expert gets more than twice its share of the tokens."""
    return min(experts.MAX_ROWS, x.shape[0], -(-2 * index.numel() // count))


def _experts_arena(args: Arguments, backward: bool) -> int:
    x, index = args[backward : backward + 2]
    *both, _ = experts.split_arguments(args)
    rows = x.new_empty(_rows_per_expert(x, index, len(both[0].weight)), 0)
    return max(_linear_arena_bytes((rows, *products.product(0)), False, backward, True, False) for products in both)


def _experts_tensors(args: Arguments, backward: bool) -> int:
    """Return the bytes of the fp32 sum over experts, and of a group's tensors, which are free before the result."""
    x, index = args[backward : backward + 2]
    first, second, _ = experts.split_arguments(args)
    size = x.dtype.itemsize
    width, outputs = first.sizes
    inner = second.sizes[0]
    copies = 4 if size == 2 else 0  # of 16-bit sums in fp32
    columns = size * (2 * (outputs + inner + width) if backward else outputs + inner + width) + copies * width
    group = columns * _rows_per_expert(x, index, len(first.weight))
    return copies * x.numel() + max(0, group - x.nbytes if copies else group)


def _attention_size(function: str, query: Tensor, value: Tensor) -> int:
    _, heads, depth = query.shape
    length, key_heads, width = value.shape
    room = getattr(loader.kernels(), function)
    return room(loader.dtype_code(query.dtype), length, heads, key_heads, depth, width)


def _recurrence_size(backward: bool, key: Tensor, value: Tensor, segments: Tensor) -> int:
    length, heads, width = value.shape
    sizes = (length, heads, *key.shape[1:], width)
    return loader.kernels().dw_recurrence_scratch_size(backward, segments.data_ptr(), segments.shape[1], *sizes)


def _convolution_backward_arena(args: Arguments) -> int:
    """Return the bytes of the sums of 64 channels per thread."""
    return torch.get_num_threads() * (args[1].shape[0] + 1) * 64 * 4


def _cross_entropy_reference(args: Arguments) -> int:
    """Return the bytes of the cross entropy without the compiled kernel.

    A soft cap keeps the capped logits and two factors of the gradient. Otherwise 16-bit or scaled logits are copied. A
    sum of exponentials or the mask of the targets takes another copy, and the mask a byte per logit.
    """
    logits, scale, softcap, with_gradient = args[0], *args[3:6]
    if _uses_kernels(logits):
        return 0
    copies = 4 if softcap > 0 else 1 + (logits.dtype.itemsize == 2 or scale != 1.0)
    return copies * logits.numel() * max(4, logits.dtype.itemsize) + logits.numel() * bool(with_gradient)


def _linear_tensors(args: Arguments) -> int:
    """Return the bytes of the quantized input, or of the reference implementation if torch computes the product."""
    x = args[0]
    product, (added, x_int8, _) = split_arguments(args)
    if _uses_compiled_product(x, product.scale):
        # 0 if the caller passed the input in int8
        return _int8_bytes(x, product.in_blocks) if product.scale is not None and x_int8 is None else 0
    result = _reference_bytes(x, product, product.sizes[1], product.bias is not None or added is not None)
    if product.format is None:
        return result
    chunk = reference_chunk_rows(*product.sizes[::-1])
    size = x.dtype.itemsize
    return max(result, _unpacked_chunk_bytes(product, size) + x.shape[0] * chunk * size)


def _linear_backward_tensors(args: Arguments) -> int:
    """Return the bytes of the quantized gradient, or of the reference implementation."""
    grad = args[0]
    product, (added, need_x, in_int8) = split_arguments(args)
    if _uses_compiled_product(grad, product.scale):
        # The gradient in int8, with a scale per block of a row.
        return _int8_bytes(grad, True) if (product.scale is not None or in_int8) and need_x else 0
    rows = grad.shape[0]
    inputs = product.sizes[0] if need_x else 0
    size = grad.dtype.itemsize
    result = _reference_bytes(grad, product, inputs, added is not None)
    if product.format is not None and need_x:
        # fp32 accumulators, their summands, and a chunk of weight rows. The result is not allocated yet.
        parts = rows * reference_chunk_rows(*product.sizes[::-1]) * size + _unpacked_chunk_bytes(product, size)
        return max(result, parts) + 4 * rows * inputs
    if product.scale is None or not inputs:
        return result
    # Quantizing a gradient in blocks needs five fp32 copies of it.
    return max(result, 20 * grad.numel() - rows * inputs * size)


def _unpacked_chunk_bytes(product: LinearProduct, size: int) -> int:
    """Return the bytes of a chunk of unpacked weight rows: in bf16, and in another type of ``size`` bytes."""
    inputs, outputs = product.sizes
    return reference_chunk_rows(outputs, inputs) * inputs * (2 + size * (size != 2))


def _reference_bytes(x: Tensor, product: LinearProduct, columns: int, adds: bool) -> int:
    """Return the peak bytes of a product composed of torch operators, in addition to its result with ``columns``
    columns.
    """
    rows, depth = x.shape
    size = x.dtype.itemsize
    # A sum is allocated while its summand is still alive.
    sums = rows * columns * size if adds or product.lora_A is not None else 0
    if product.lora_B is not None:
        sums += product.lora_B.numel() * (4 + size * (size == 2))
    if product.scale is None or not columns:
        return sums
    # The input in int8 and in fp32, and the weight and the accumulators in fp32. The result is not allocated yet.
    return max(sums, rows * depth * 5 + product.weight.numel() * 4 + rows * columns * (4 - size))


def _uses_compiled_product(x: Tensor, scale: Tensor | None) -> bool:
    """True if the kernels compute this product. Weights are int8 if ``scale`` is given."""
    return _uses_kernels(x) and loader.multiplies(loader.dtype_code(x.dtype if scale is None else torch.int8))


def _uses_kernels(tensor: Tensor) -> bool:
    """True if the kernels support tensors like this one."""
    supported = tensor.dtype in (torch.bfloat16, torch.float32) and tensor.device.type == "cpu"
    return supported and loader.library() is not None


def _if_compiled(rule: Rule) -> Rule:
    """Return a rule that yields 0 for tensors that the kernels do not support."""
    return lambda args: rule(args) if _uses_kernels(args[0]) else 0


# Peak bytes of the arenas, by operator.
ARENAS: dict[object, Rule] = {
    operator.default: _if_compiled(rule)
    for operator, rule in (
        (_ops.linear, _linear_arena),
        (_ops.linear_backward, _linear_backward_arena),
        (_ops.factors_backward, _factors_backward_arena),
        (_ops.class_gradient_, _class_gradient_arena),
        (_ops.head_gradient_, _head_gradient_arena),
        (_ops.cross_entropy_, _cross_entropy_arena),
        (_ops.recurrence, lambda args: _recurrence_size(False, args[1], args[2], args[5])),
        (_ops.recurrence_backward, lambda args: _recurrence_size(True, args[2], args[3], args[6])),
        (_ops.experts, lambda args: _experts_arena(args, False)),
        (_ops.experts_backward, lambda args: _experts_arena(args, True)),
        (_ops.convolution_backward, _convolution_backward_arena),
        (_ops.attention, lambda args: _attention_size("dw_attention_scratch_size", args[0], args[2])),
        (_ops.attention_backward, lambda args: _attention_size("dw_attention_backward_scratch_size", args[1], args[3])),
    )
}
# Bytes of temporary tensors, by operator.
TENSORS: dict[object, Rule] = {
    _ops.cross_entropy_.default: _cross_entropy_reference,
    _ops.linear.default: _linear_tensors,
    _ops.linear_backward.default: _linear_backward_tensors,
    _ops.class_gradient_.default: _if_compiled(_class_scales),
    _ops.experts.default: lambda args: _experts_tensors(args, False),
    _ops.experts_backward.default: lambda args: _experts_tensors(args, True),
}


def arena_bytes(func: object, args: Arguments) -> int:
    """Return the peak bytes of the kernels' arenas over all threads during ``func``, or 0 for other operators."""
    return ARENAS[func](args) if func in ARENAS else 0


def device_scratch_bytes(func: object, args: Arguments) -> int:
    """Return the bytes that a GPU's attention allocates for its backward pass in addition to its results.

    FlashAttention sums the gradient of the queries in fp32, and those of shared keys and values per query head.
    """
    if func is not _ops.attention_backward.default:
        return 0
    query, key = args[1:3]
    is_shared = query.shape[1] != key.shape[1]
    return query.numel() * (4 + 2 * query.dtype.itemsize * is_shared)


_aten = torch.ops.aten


def scratch_bytes(func: object, args: Arguments) -> int:
    """Return the peak bytes of temporary tensors in ``func``, in addition to its result."""
    return _SCRATCH[func](args) if func in _SCRATCH else 0


def _flash_tiles(query: Tensor, key: Tensor) -> tuple[int, int]:
    """Return the (queries, keys) per tile of one thread, as FlashAttentionKernel.cpp chooses them by length."""
    length = query.shape[2]
    queries = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(queries, length), min(512, key.shape[2])


def _flash_forward_scratch(args: Arguments) -> int:
    query, key = args[:2]
    queries, keys = _flash_tiles(query, key)
    # Per thread: fp32 scores, two numbers per row and the output, and for 16-bit types a rounded copy.
    size = queries * (keys + 2 + query.shape[3]) * 4
    if query.dtype.itemsize == 2:
        size += queries * keys * 2
    return torch.get_num_threads() * size


def _flash_backward_scratch(args: Arguments) -> int:
    grad, query, key = args[:3]
    queries, keys = _flash_tiles(query, key)
    # Scores and their gradient, and for 16-bit types a rounded copy of both.
    size = torch.get_num_threads() * 2 * queries * keys * (6 if query.dtype.itemsize == 2 else 4)
    if not grad.transpose(1, 2).is_contiguous():
        size += grad.numel() * grad.dtype.itemsize  # the gradient is copied to a contiguous layout
    return size


def _mean_scratch(args: Arguments) -> int:
    # The mean of a 16-bit type is computed from a complete fp32 copy.
    values = args[0]
    return values.numel() * 4 if values.is_floating_point() and values.dtype.itemsize == 2 else 0


def _pointwise_scratch(args: Arguments) -> int:
    """Return the bytes of the copies of inputs that are converted to a common type."""
    first = args[0]
    second = args[1]
    if not isinstance(second, Tensor) or first.dtype == second.dtype:
        return 0
    common = torch.result_type(first, second)
    return sum(t.numel() * common.itemsize for t in (first, second) if t.dtype != common and t.dim())


def _in_place_scratch(args: Arguments) -> int:
    """Return the bytes as in :func:`_pointwise_scratch`, plus a copy for the result if the first input is converted."""
    first = args[0]
    second = args[1]
    common = torch.result_type(first, second)
    result_bytes = first.numel() * common.itemsize if first.dtype != common else 0
    return _pointwise_scratch(args) + result_bytes


_SCRATCH: dict[object, Rule] = {
    **TENSORS,
    **({FLASH_FORWARD.default: _flash_forward_scratch} if FLASH_FORWARD else {}),
    **({FLASH_BACKWARD.default: _flash_backward_scratch} if FLASH_BACKWARD else {}),
    _aten.mean.dim: _mean_scratch,
    _aten.mean.default: _mean_scratch,
    **{getattr(_aten, name).Tensor: _pointwise_scratch for name in ("add", "sub", "mul", "div")},
    **{getattr(_aten, name + "_").Tensor: _in_place_scratch for name in ("add", "sub", "mul", "div")},
}
