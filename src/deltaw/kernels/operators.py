"""Registration of kernels as torch operators (schema, kernel, output shapes and operation count), and argument checks.

Registered kernels are visible to dispatch modes such as dry runs on fake tensors, operation counters and tracers. They
have no derivative, which the calling functions define. If no mode observes a call, the kernel is called directly
because torch's dispatcher takes longer than a small kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from deltaw.kernels.torch_private import is_observed


class SimulatedDevice(threading.local):
    """Device that a dry run of this thread simulates.

    Attributes:
        compiles: True if torch compiles kernels for the device, so that an operator allocates only its results. None
            outside of dry runs for other devices than the CPU.
    """

    compiles: bool | None = None


simulated_device = SimulatedDevice()
# Types of devices without fp64.
WITHOUT_FP64 = ("mps",)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("deltaw", "DEF")


def define(
    schema: str, shapes: Callable[..., Any], operations: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that registers a function as the operator ``deltaw::name``.

    Args:
        schema: Name, arguments and results in torch's schema notation.
        shapes: Returns empty tensors with the shapes and types of the results.
        operations: Returns the number of floating-point operations from the operator's arguments. A multiply-add counts
            as two.

    Returns:
        Decorator. The decorated function calls the operator with positional arguments.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"deltaw::{name}", shapes, lib=_LIBRARY)
    operator = getattr(torch.ops.deltaw, name)
    if operations is not None:
        flop_registry[operator] = lambda *args, out_val=None, **kwargs: operations(*args, **kwargs)
    overload = operator.default

    def register(compute: Callable[..., Any]) -> Any:
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, compute, device)

        def call(*args: Any) -> Any:
            tensors = [a for a in args if isinstance(a, Tensor)]
            if simulated_device.compiles is False or can_call_directly(*tensors, devices=("cpu", "cuda")):
                return compute(*args)
            return overload(*args)

        return call

    return register


def widest_dtype(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 for devices without fp64."""
    return torch.float32 if device.type in WITHOUT_FP64 else torch.float64


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of sums over a tensor's elements: fp64 for fp64 tensors, otherwise fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def can_call_directly(*tensors: Tensor, devices: tuple[str, ...] = ("cpu",)) -> bool:
    """True if all tensors are real and on these devices, and no mode, profiler or compiler observes the call."""
    if is_observed() or torch.compiler.is_compiling():
        return False
    return all(type(t) in PLAIN_TYPES and t.device.type in devices for t in tensors)


def check_targets(targets: Tensor, classes: int) -> None:
    """Check that class indices are in ``0 … classes - 1``.

    Raises:
        IndexError: if a target is out of bounds.
        TypeError: if the targets are not int64.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}, not {torch.int64}")
    if not targets.numel():
        return
    for target in (int(targets.min()), int(targets.max())):
        if not 0 <= target < classes:
            raise IndexError(f"target {target} is out of bounds for {classes} classes")


def check_positions(positions: Tensor, length: int) -> None:
    """Check that ``positions`` are strictly ascending within a packed row of ``length`` tokens.

    Raises:
        IndexError: if a position is out of bounds.
        ValueError: if the tensor is not one-dimensional or not strictly ascending.
        TypeError: if the positions are not int64.
    """
    if positions.dtype != torch.int64:
        raise TypeError(f"selected positions are {positions.dtype}, not {torch.int64}")
    if positions.dim() != 1:
        raise ValueError(f"selected positions are {tuple(positions.shape)}, not a one-dimensional tensor")
    listed = positions.tolist()
    for position in (min(listed, default=0), max(listed, default=0)):
        if listed and not 0 <= position < length:
            raise IndexError(f"selected position {position} is out of bounds for {length} tokens")
    if any(later <= position for position, later in pairwise(listed)):
        raise ValueError("selected positions must ascend without duplicates")


def check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    """Check that a tensor is a contiguous fp32 vector of ``size`` elements. None is accepted.

    Raises:
        ValueError: if it is not.
    """
    check_shape(name, tensor, size)
    if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous and in fp32")


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Check the shape of a tensor. None is accepted.

    Raises:
        ValueError: if the shape differs. The message contains both shapes.
    """
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
