"""How a kernel becomes an operator of torch: a schema, the kernel, its shapes without values, its operations.

As operators the kernels are seen by everything that looks at what torch computes: plans that run without
values, counters of operations, profilers. They have no derivative of their own; the functions that call them
bring theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_LIBRARY = torch.library.Library("deltaw", "DEF")


def define(
    schema: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    operations: Callable[..., int] | None = None,
) -> Any:
    """Register an operator ``deltaw::name``.

    Args:
        schema: name, arguments and results in torch's notation.
        compute: gives the results. shapes: gives empty tensors like them.
        operations: floating-point operations, two for each multiplication and addition, from the operator's
            own arguments.

    Returns:
        the operator, to be called.
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
    return operator.default
