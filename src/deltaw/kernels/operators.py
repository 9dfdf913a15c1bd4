"""How a kernel becomes an operator of torch: a schema, the kernel, its shapes on fake tensors, its cost.

As operators the kernels are visible to everything that observes torch: dry runs on fake tensors, counters of
operations, tracers. They have no derivative of their own; the functions that call them define it. If nothing
observes the call, kernels are called directly, because torch's dispatcher takes longer than a small kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from deltaw.kernels.torch_private import watched

ORDINARY = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("deltaw", "DEF")


def define(
    schema: str, compute: Callable[..., Any], shapes: Callable[..., Any], operations: Callable[..., int] | None = None
) -> Any:
    """Register an operator ``deltaw::name``.

    Args:
        schema: name, arguments and results in torch's notation.
        compute: gives the results. shapes: gives empty tensors like them.
        operations: floating-point operations, two for each multiplication and addition, from the operator's
            own arguments.

    Returns:
        the operator, to be called with arguments in their places.
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
        return compute(*args) if unwatched(*tensors) else overload(*args)

    return call


def sums_dtype(of: Tensor) -> torch.dtype:
    """The type of sums over numbers of a tensor: fp32, and fp64 for fp64."""
    return torch.float64 if of.dtype == torch.float64 else torch.float32


def unwatched(*tensors: Tensor) -> bool:
    """Whether these are real CPU tensors, and no dispatch mode, profiler or compiler observes the call."""
    if watched():
        return False
    return all(type(t) in ORDINARY and t.device.type == "cpu" for t in tensors) and not torch.compiler.is_compiling()
