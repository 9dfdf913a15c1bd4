"""Bytes that an operator takes inside and gives back before it returns, where they matter.

A dispatch mode sees what goes into an operator and what comes out. Read off the allocator, most of torch's
kernels on the processor take nothing else; those that do, and are part of training, stand here. Left out are
the blocks of oneDNN's bf16 products (some 0.1 to 2 MB a thread, by processor and shape), and what stays in
the kilobytes.

Knows kernels and shapes; not models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from deltaw.kernels import attention, head_gradient, loader, quantize, rows
from deltaw.kernels.linear import Product, product_of, rows_at_once
from deltaw.kernels.quantize import INT8_BLOCK
from deltaw.kernels.torch_private import FLASH_BACKWARD, FLASH_FORWARD

# Bytes that the compiled kernels take inside: what each thread's arena holds at an operator's peak.
#
# The kernels themselves say what they take, since that differs between processors: each thread takes what it
# needs from an arena of its own. An arena is no tensor: the allocator of tensors does not see it, and the
# process holds it between calls. The tensors that an operator makes for itself in Python are listed apart.
# Without the kernels there is neither.
#
# Knows operators and shapes; not models.


# Importing them defines the operators.
assert attention and head_gradient and rows

_ops = torch.ops.deltaw
Arguments: TypeAlias = tuple[Any, ...]
Rule: TypeAlias = Callable[[Arguments], int]


def _room_of_linear(args: Arguments, in_blocks: bool, backward: bool, need_x: bool, in_int8: bool) -> int:
    left, (of, _) = args[0], product_of(args)
    if not _multiplied(left, of.scale):
        return 0
    (inputs, outputs), rank = of.sizes, 0 if of.lora_A is None else of.lora_A.shape[1]
    return loader.kernels().dw_linear_room(
        loader.number(left.dtype), left.shape[0], outputs, inputs, of.number, of.by_column,
        of.scale is not None or in_int8, in_blocks, rank, backward, need_x,
    )  # fmt: skip


def _linear(args: Arguments) -> int:
    return _room_of_linear(args, product_of(args)[0].in_blocks, False, False, False)


def _linear_backward(args: Arguments) -> int:
    of, (_, need_x, in_int8) = product_of(args)
    return _room_of_linear(args, of.format is None, True, need_x, in_int8)


def _int8_bytes(x: Tensor, in_blocks: bool) -> int:
    return x.numel() + 4 * math.prod(quantize.scales_shape(x, in_blocks))


def _factors_backward(args: Arguments) -> int:
    x, h = args[:2]
    return loader.kernels().dw_factors_room(loader.number(x.dtype), *h.shape)


def _class_gradient(args: Arguments) -> int:
    grad, _, weight = args[:3]
    return loader.kernels().dw_class_gradient_room(*grad.shape, weight.shape[1])


def _class_scales(args: Arguments) -> int:
    """A scale for each block of classes."""
    rows, classes = args[0].shape
    return rows * -(-classes // INT8_BLOCK) * 4


def _head_gradient(args: Arguments) -> int:
    return loader.kernels().dw_head_gradient_room(*args[2].shape)


def _cross_entropy(args: Arguments) -> int:
    logits, with_gradient = args[0], args[5]
    return torch.get_num_threads() * -(-logits.shape[1] // 16) * 16 * 4 if with_gradient else 0


def _room_of_attention(function: str, query: Tensor, value: Tensor) -> int:
    _, heads, depth = query.shape
    length, key_heads, width = value.shape
    room = getattr(loader.kernels(), function)
    return room(loader.number(query.dtype), length, heads, key_heads, depth, width)


def _cross_entropy_reference(args: Arguments) -> int:
    """Without the kernel: the scaled logits and their log-softmax, with a soft cap the logits before it, of a
    half type a wide copy, and for a gradient the slopes of two of them."""
    logits, softcap, with_gradient = args[0], args[4], args[5]
    if _compiled(logits):
        return 0
    copies = 2 + (softcap > 0) + (logits.dtype.itemsize == 2) + 2 * bool(with_gradient)
    return copies * logits.numel() * max(4, logits.dtype.itemsize)


def _linear_tensors(args: Arguments) -> int:
    """Of a product: the rounded input, or what the reference makes where torch computes products."""
    x, (of, (added, x_int8, _)) = args[0], product_of(args)
    if _multiplied(x, of.scale):
        made = of.scale is not None and x_int8 is None  # the input in int8, where the caller has none
        return _int8_bytes(x, of.in_blocks) if made else 0
    later = _reference_bytes(x, of, of.sizes[1], of.bias is not None or added is not None)
    if of.format is None:
        return later
    most, size = rows_at_once(*of.sizes[::-1]), x.dtype.itemsize
    return max(later, _numbers_of_rows(of, size) + x.shape[0] * most * size)


def _linear_backward_tensors(args: Arguments) -> int:
    """Of a product's gradient: the rounded gradient, or what the reference makes."""
    grad, (of, (added, need_x, in_int8)) = args[0], product_of(args)
    if _multiplied(grad, of.scale):
        # The gradient in int8 with a scale for each block of a row.
        return _int8_bytes(grad, True) if (of.scale is not None or in_int8) and need_x else 0
    rows, inputs, size = grad.shape[0], of.sizes[0] if need_x else 0, grad.dtype.itemsize
    later = _reference_bytes(grad, of, inputs, added is not None)
    if of.format is not None and need_x:
        # Sums in fp32, what is added to them, and some rows of the weight; the result is not there yet.
        parts = rows * rows_at_once(*of.sizes[::-1]) * size + _numbers_of_rows(of, size)
        return max(later, parts) + 4 * rows * inputs
    if of.scale is None or not inputs:
        return later
    # A gradient that is rounded in blocks is there in fp32 five times.
    return max(later, 20 * grad.numel() - rows * inputs * size)


def _numbers_of_rows(of: Product, size: int) -> int:
    """Some rows of a weight in blocks as numbers: in bf16, and in another type of ``size`` bytes."""
    inputs, outputs = of.sizes
    return rows_at_once(outputs, inputs) * inputs * (2 + size * (size != 2))


def _reference_bytes(left: Tensor, of: Product, columns: int, adds: bool) -> int:
    """What a product composed of torch's operators holds at its peak beside its result, of ``columns``."""
    rows, depth = left.shape
    size = left.dtype.itemsize
    # A sum is made while what it is added to is still there.
    sums = rows * columns * size if adds or of.lora_A is not None else 0
    if of.lora_B is not None:
        sums += of.lora_B.numel() * (4 + size * (size == 2))
    if of.scale is None or not columns:
        return sums
    # The left side in int8 and in fp32, the weight and the sums in fp32; the result is not there yet.
    return max(sums, rows * depth * 5 + of.weight.numel() * 4 + rows * columns * (4 - size))


def _multiplied(left: Tensor, scale: Tensor | None) -> bool:
    """Whether the kernels compute products of rows like these, with weights in int8 where there is a
    scale."""
    return _compiled(left) and loader.multiplies(loader.number(left.dtype if scale is None else torch.int8))


def _compiled(first: Tensor) -> bool:
    """Whether the kernels run on tensors like this one."""
    served = first.dtype in (torch.bfloat16, torch.float32) and first.device.type == "cpu"
    return served and loader.library() is not None


def _where_compiled(rule: Rule) -> Rule:
    """The rule where the kernels run: tensors on the processor, in a type that they take."""
    return lambda args: rule(args) if _compiled(args[0]) else 0


# Bytes that an operator's arenas hold at its peak.
ARENAS: dict[object, Rule] = {
    operator.default: _where_compiled(rule)
    for operator, rule in (
        (_ops.linear, _linear),
        (_ops.linear_backward, _linear_backward),
        (_ops.factors_backward, _factors_backward),
        (_ops.class_gradient_, _class_gradient),
        (_ops.head_gradient_, _head_gradient),
        (_ops.cross_entropy_, _cross_entropy),
        (_ops.attention, lambda args: _room_of_attention("dw_attention_room", args[0], args[2])),
        (_ops.attention_backward, lambda args: _room_of_attention("dw_attention_backward_room", args[1], args[3])),
    )
}
# Bytes of the tensors that an operator makes for itself.
TENSORS: dict[object, Rule] = {
    _ops.cross_entropy_.default: _cross_entropy_reference,
    _ops.linear.default: _linear_tensors,
    _ops.linear_backward.default: _linear_backward_tensors,
    _ops.class_gradient_.default: _where_compiled(_class_scales),
}


def arena_bytes(func: object, args: Arguments) -> int:
    """What the kernels' arenas hold at the peak of ``func``, over all threads; 0 for other operators."""
    return ARENAS[func](args) if func in ARENAS else 0


_aten = torch.ops.aten


def scratch_bytes(func: object, args: Arguments) -> int:
    """Tensors that ``func`` allocates in addition to its result, at its own peak, in bytes."""
    return _SCRATCH[func](args) if func in _SCRATCH else 0


def _flash_tiles(query: Tensor, key: Tensor) -> tuple[int, int]:
    """(queries, keys) that one thread holds at a time: FlashAttentionKernel.cpp's choice by length."""
    length = query.shape[2]
    queries = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(queries, length), min(512, key.shape[2])


def _flash_forward(args: Arguments) -> int:
    query, key = args[:2]
    queries, keys = _flash_tiles(query, key)
    # Each thread holds fp32 scores, two numbers a row and the output; of half types also a rounded copy.
    room = queries * (keys + 2 + query.shape[3]) * 4
    if query.dtype.itemsize == 2:
        room += queries * keys * 2
    return torch.get_num_threads() * room


def _flash_backward(args: Arguments) -> int:
    grad, query, key = args[:3]
    queries, keys = _flash_tiles(query, key)
    # Scores and their gradient, and of half types a rounded copy of both.
    room = torch.get_num_threads() * 2 * queries * keys * (6 if query.dtype.itemsize == 2 else 4)
    if not grad.transpose(1, 2).is_contiguous():
        room += grad.numel() * grad.dtype.itemsize  # it is laid out anew
    return room


def _mean(args: Arguments) -> int:
    # The mean of a half type is taken of a whole copy in fp32.
    values = args[0]
    return values.numel() * 4 if values.is_floating_point() and values.dtype.itemsize == 2 else 0


def _pointwise(args: Arguments) -> int:
    """Inputs of different types are first copied, each as a whole, into the type they have in common."""
    first, second = args[0], args[1]
    if not isinstance(second, Tensor) or first.dtype == second.dtype:
        return 0
    common = torch.result_type(first, second)
    return sum(t.numel() * common.itemsize for t in (first, second) if t.dtype != common and t.dim())


def _in_place(args: Arguments) -> int:
    """As :func:`_pointwise`; a first input that is copied takes the result in another copy."""
    first, second = args[0], args[1]
    common = torch.result_type(first, second)
    back = first.numel() * common.itemsize if first.dtype != common else 0
    return _pointwise(args) + back


_SCRATCH: dict[object, Rule] = {
    **TENSORS,
    **({FLASH_FORWARD.default: _flash_forward} if FLASH_FORWARD else {}),
    **({FLASH_BACKWARD.default: _flash_backward} if FLASH_BACKWARD else {}),
    _aten.mean.dim: _mean,
    _aten.mean.default: _mean,
    **{getattr(_aten, name).Tensor: _pointwise for name in ("add", "sub", "mul", "div")},
    **{getattr(_aten, name + "_").Tensor: _in_place for name in ("add", "sub", "mul", "div")},
}
