"""Bytes that an operator takes inside and gives back before it returns, where they matter.

A dispatch mode sees what goes into an operator and what comes out. Read off the allocator, most of torch's
kernels on the processor take nothing else; those that do, and are part of training, stand here. Left out are
the blocks of oneDNN's bf16 products (some 0.1 to 2 MB a thread, by processor and shape), and what stays in
the kilobytes.

Knows kernels and shapes; not models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltaw.kernels.torch_private import FLASH_BACKWARD, FLASH_FORWARD
from deltaw.memory import kernel_scratch

_aten = torch.ops.aten


def scratch_bytes(func: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tensors that ``func`` allocates in addition to its result, at its own peak, in bytes."""
    rule = _SCRATCH.get(func)
    return 0 if rule is None else rule(args, kwargs)


def _flash_tiles(query: Tensor, key: Tensor) -> tuple[int, int]:
    """(queries, keys) that one thread holds at a time: FlashAttentionKernel.cpp's choice by length."""
    length = query.shape[2]
    queries = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(queries, length), min(512, key.shape[2])


def _flash_forward(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    query, key = args[:2]
    queries, keys = _flash_tiles(query, key)
    # Each thread holds fp32 scores, two numbers a row and the output; of half types also a rounded copy.
    room = queries * (keys + 2 + query.shape[3]) * 4
    if query.dtype.itemsize == 2:
        room += queries * keys * 2
    return torch.get_num_threads() * room


def _flash_backward(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    grad, query, key = args[:3]
    queries, keys = _flash_tiles(query, key)
    # Scores and their gradient, and of half types a rounded copy of both.
    room = torch.get_num_threads() * 2 * queries * keys * (6 if query.dtype.itemsize == 2 else 4)
    if not grad.transpose(1, 2).is_contiguous():
        room += grad.numel() * grad.dtype.itemsize  # it is laid out anew
    return room


def _mean(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    # The mean of a half type is taken of a whole copy in fp32.
    values = args[0]
    return values.numel() * 4 if values.is_floating_point() and values.dtype.itemsize == 2 else 0


def _pointwise(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Inputs of different types are first copied, each as a whole, into the type they have in common."""
    first, second = args[0], args[1]
    if not isinstance(second, Tensor) or first.dtype == second.dtype:
        return 0
    common = torch.result_type(first, second)
    return sum(t.numel() * common.itemsize for t in (first, second) if t.dtype != common and t.dim())


def _in_place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """As :func:`_pointwise`; a first input that is copied takes the result in another copy."""
    first, second = args[0], args[1]
    common = torch.result_type(first, second)
    back = first.numel() * common.itemsize if first.dtype != common else 0
    return _pointwise(args, kwargs) + back


_SCRATCH: dict[object, Callable[[tuple[Any, ...], Mapping[str, Any]], int]] = {
    **kernel_scratch.TENSORS,
    **({FLASH_FORWARD.default: _flash_forward} if FLASH_FORWARD else {}),
    **({FLASH_BACKWARD.default: _flash_backward} if FLASH_BACKWARD else {}),
    _aten.mean.dim: _mean,
    _aten.mean.default: _mean,
    **{getattr(_aten, name).Tensor: _pointwise for name in ("add", "sub", "mul", "div")},
    **{getattr(_aten, name + "_").Tensor: _in_place for name in ("add", "sub", "mul", "div")},
}
