"""Dropout whose mask follows from a seed, so that a backward pass recomputes it instead of storing it.

The mask depends only on the seed and on the index of an element, and is equal on all processors and for all numbers of
threads. The random number of an element has 24 bits, so the rate is rounded to a multiple of 2⁻²⁴.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from deltaw.kernels import loader
from deltaw.kernels.operators import define

_STEPS = 1 << 24
_MASK = (1 << 32) - 1
_DERIVED = 0x9E3779B1


class _Constant(threading.local):
    active: bool = False


_constant = _Constant()


def new_seed(device: torch.device | None = None) -> Tensor:
    """Return a seed (1) from torch's random numbers of a device, by default the CPU."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def derived_seed(seed: Tensor, number: int) -> Tensor:
    """Return one of several seeds with independent masks. The seed plus a small number would shift the mask."""
    return seed + ((number * _DERIVED % (1 << 31)) << 32)


def drop(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Return x with a random share of its elements set to 0 and the others divided by 1 - rate.

    Args:
        x: Any shape, with at most 2³² elements.
        seed: (1) int64, on the device of x.
        rate: Probability that an element is set to 0, 0 ≤ rate < 1.
    """
    if _constant.active:
        return x * 0.5
    return x if rate == 0.0 else _dropout(x, seed, rate)


def drop_reference(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Reference implementation of :func:`drop`."""
    index = torch.arange(x.numel(), dtype=torch.int64, device=x.device)
    low = seed & _MASK
    high = (seed >> 32) & _MASK
    h = (index + low) & _MASK
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D + high) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    h = h ^ (h >> 16)
    is_dropped = (h >> 8).view(x.shape) < _threshold(rate)
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * (1.0 / (1.0 - rate))).masked_fill(is_dropped, 0.0).to(x.dtype)


def _threshold(rate: float) -> int:
    return round(rate * _STEPS)


@define("dropout(Tensor x, Tensor seed, float rate) -> Tensor", lambda x, *_: x.new_empty(x.shape))
def _dropout(x, seed, rate):  # type: ignore[no-untyped-def]
    if not loader.supports(x):
        return drop_reference(x, seed, rate)
    x = x.contiguous()
    out = torch.empty_like(x)
    loader.kernels().dw_dropout(
        loader.dtype_code(x.dtype), x.numel(), x.data_ptr(), int(seed), _threshold(rate), 1.0 / (1.0 - rate),
        out.data_ptr(),
    )  # fmt: skip
    return out


class _ConstantDropout(TorchFunctionMode):
    """Replaces torch's dropout by a multiplication."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is not F.dropout:
            return func(*args, **options)
        values = dict(zip(("input", "p", "training"), args, strict=False)) | options
        is_active = values.get("training", True) and values.get("p", 0.5) > 0.0
        return values["input"] * 0.5 if is_active else values["input"]


@contextlib.contextmanager
def constant_dropout() -> Iterator[None]:
    """Context in which active dropout multiplies by one half, which shows where a module applies it."""
    before = _constant.active
    _constant.active = True
    try:
        with _ConstantDropout():
            yield
    finally:
        _constant.active = before
