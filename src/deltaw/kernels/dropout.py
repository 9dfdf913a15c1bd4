"""Dropout with a mask that is computed from a seed. A backward pass computes it again, so it is not stored.

The mask depends only on the seed and the index of an element. It is equal on all processors and for any number of
threads. Random numbers have 24 bits, so rates are rounded to multiples of 2⁻²⁴.
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

_RANDOM_NUMBERS = 1 << 24
_LOW_32_BITS = (1 << 32) - 1
# 2³² times the golden ratio, modulo 2³². Its multiples are spread evenly (Knuth, TAOCP 3, section 6.4).
_GOLDEN_RATIO = 0x9E3779B1


class _ThreadMode(threading.local):
    """Mode of a thread.

    Attributes:
        constant: True inside :func:`constant_dropout`.
    """

    constant: bool = False


_mode = _ThreadMode()


def new_seed(device: torch.device | None = None) -> Tensor:
    """Return a random seed (1) from torch's generator of a device, by default the CPU."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def derived_seed(seed: Tensor, number: int) -> Tensor:
    """Return the seed of an independent mask for each number.

    The numbers change the high bits. The low bits are added to the indices of elements, so a change would shift the
    mask.
    """
    return seed + ((number * _GOLDEN_RATIO % (1 << 31)) << 32)


def apply_dropout(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Return x with random elements set to 0 and the remaining elements divided by 1 - rate.

    Args:
        x: Any shape, up to 2³² elements.
        seed: (1) int64, on the device of x.
        rate: Probability that an element is set to 0, 0 ≤ rate < 1.
    """
    if _mode.constant:
        return x * 0.5
    return x if rate == 0.0 else _dropout(x, seed, rate)


def apply_dropout_reference(x: Tensor, seed: Tensor, rate: float) -> Tensor:
    """Reference implementation of :func:`apply_dropout`. The hash is described in ``csrc/dropout.cpp``."""
    index = torch.arange(x.numel(), dtype=torch.int64, device=x.device)
    low = seed & _LOW_32_BITS
    high = (seed >> 32) & _LOW_32_BITS
    bits = (index + low) & _LOW_32_BITS
    bits = bits ^ (bits >> 16)
    bits = (bits * 0x7FEB352D + high) & _LOW_32_BITS
    bits = bits ^ (bits >> 15)
    bits = (bits * 0x846CA68B) & _LOW_32_BITS
    bits = bits ^ (bits >> 16)
    is_dropped = (bits >> 8).view(x.shape) < _threshold(rate)
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * (1.0 / (1.0 - rate))).masked_fill(is_dropped, 0.0).to(x.dtype)


def _threshold(rate: float) -> int:
    """Return the number below which a random number sets an element to 0."""
    return round(rate * _RANDOM_NUMBERS)


@define("dropout(Tensor x, Tensor seed, float rate) -> Tensor", lambda x, *_: x.new_empty(x.shape))
def _dropout(x, seed, rate):  # type: ignore[no-untyped-def]
    if not loader.supports(x):
        return apply_dropout_reference(x, seed, rate)
    x = x.contiguous()
    out = torch.empty_like(x)
    loader.kernels().dw_dropout(
        loader.dtype_code(x.dtype), x.numel(), x.data_ptr(), int(seed), _threshold(rate), 1.0 / (1.0 - rate),
        out.data_ptr(),
    )  # fmt: skip
    return out


class _ConstantDropout(TorchFunctionMode):
    """Replaces torch's dropout by a factor of one half."""

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
    """Context in which active dropout multiplies all elements by one half, so that its sites can be compared."""
    before = _mode.constant
    _mode.constant = True
    try:
        with _ConstantDropout():
            yield
    finally:
        _mode.constant = before
