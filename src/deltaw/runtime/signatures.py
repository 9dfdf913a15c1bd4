"""Signatures of modules: two modules with equal signatures run the same code on weights of any size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from deltaw.kernels.torch_modules import direct_parameters
from deltaw.runtime.block_roles import dropout_rates, stores_in_out

# Attributes that differ between blocks with the same code. runtime/fused.py checks "store_full_length_kv" separately.
_PER_LAYER_FLAGS = (
    *("layer_idx", "layer_number", "scaling", "training", "gradient_checkpointing", "enabled", "merged"),
    "store_full_length_kv",
)
Signature = tuple[tuple[str, ...], ...]


def signature(block: nn.Module) -> Signature:
    """Return the properties that a block's code depends on: the class and flags of each module inside it, without rates
    of dropout.

    Adapted and int8-quantized layers count as the layers that they replace.
    """
    return tuple((path, *_kind_of(module), *_flags_of(module)) for path, module in block.named_modules())


def _kind_of(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.Linear):
        return ("linear", str(direct_parameters(module).get("bias") is not None))
    if stores_in_out(module):
        return ("conv1d",)
    kind = type(module)
    parameters = sorted(name for name, parameter in direct_parameters(module).items() if parameter is not None)
    return (f"{kind.__module__}.{kind.__qualname__}", *parameters)


def _flags_of(module: nn.Module) -> Iterator[str]:
    if isinstance(module, nn.Linear) or stores_in_out(module):
        return
    rates = dropout_rates(vars(module))
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in _PER_LAYER_FLAGS or name in rates:
            continue
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, bool | float | str) or (is_integer and name.startswith("use")):
            yield f"{name}={value}"
