"""Registration of kernels as torch operators: schema, kernel, output shapes for fake tensors, and operation count.

Registered kernels are visible to dispatch modes such as dry runs on fake tensors, operation counters and tracers. They
have no derivative, which the calling functions define. If no mode observes a call, the kernel is called directly
because torch's dispatcher takes longer than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from deltaw.kernels.torch_private import is_observed

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("deltaw", "DEF")


def define(
    schema: str, compute: Callable[..., Any], shapes: Callable[..., Any], operations: Callable[..., int] | None = None
) -> Any:
    """Register an operator ``deltaw::name``.

    Args:
        schema: Name, arguments and results in torch's schema notation.
        compute: Computes the results.
        shapes: Returns empty tensors with the shapes and types of the results.
        operations: Returns the number of floating-point operations from the operator's arguments. A multiply-add counts
            as two.

    Returns:
        Function that calls the operator with positional arguments.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"deltaw::{name}", shapes, lib=_LIBRARY)
    operator = getattr(torch.ops.deltaw, name)
    if operations is not None:

        def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            return operations(*args, **kwargs)

        flop_registry[operator] = formula
    overload = operator.default

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        return compute(*args) if can_call_directly(*tensors) else overload(*args)

    return call


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the type of sums over a tensor's elements: fp64 for fp64 tensors, otherwise fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def can_call_directly(*tensors: Tensor) -> bool:
    """True if all tensors are real CPU tensors and no dispatch mode, profiler or compiler observes the call."""
    if is_observed():
        return False
    return all(type(t) in PLAIN_TYPES and t.device.type == "cpu" for t in tensors) and not torch.compiler.is_compiling()
