"""Places where a block applies dropout, found by its effect.

Dropout with a constant mask multiplies by one half (:func:`deltaw.kernels.dropout.constant_dropout`). With one rate of
a block active, the model's code then equals the fused block that multiplies in the same place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn

from deltaw.kernels.dropout import constant_dropout
from deltaw.lora.layers import LoRALayer
from deltaw.runtime.block_roles import BlockRoles, DropoutPlace, DropoutRole, dropout_rates
from deltaw.runtime.recognition import TOLERANCE, AttentionConfig, BlockCall, call_difference

_RATE = 0.5
_NAMES: tuple[DropoutPlace, ...] = get_args(DropoutPlace)
# All sets of places, small ones first.
_PLACES = [places for count in range(len(_NAMES) + 1) for places in itertools.combinations(_NAMES, count)]


def with_dropout_roles(
    call: BlockCall, roles: BlockRoles, run: Callable[[nn.Module, BlockRoles, AttentionConfig], Callable[..., Any]]
) -> BlockRoles:
    """Return a verified description with the places of the block's dropout, as far as they are found.

    Args:
        call: Recorded call of the block, in evaluation mode.
        run: Creates the replacement of a block from its description and attention parameters.
    """
    config = call.config or AttentionConfig(roles.attention.head_size**-0.5)
    modules = {path: m for path, m in call.block.named_modules() if not isinstance(m, LoRALayer)}
    rates = [(path, attribute) for path, module in modules.items() for attribute in dropout_rates(vars(module))]
    found = []
    for path, attribute in rates:
        with _active(modules, path, attribute), constant_dropout(), torch.random.fork_rng(devices=[]):
            for places in _PLACES:
                role = DropoutRole(path, attribute, places)
                replacement = run(call.block, replace(roles, dropout=(role,)), config)
                if call_difference(call, replacement) < TOLERANCE:
                    found.append(role)
                    break
    return replace(roles, dropout=tuple(found))


@contextlib.contextmanager
def _active(modules: Mapping[str, nn.Module], path: str, attribute: str) -> Iterator[None]:
    """Context in which one rate is active and the others are 0, in training mode."""
    tables = {id(module): vars(module) for module in modules.values()}
    before = {key: {"training": table["training"], **dropout_rates(table)} for key, table in tables.items()}
    for table in tables.values():
        table["training"] = True
        table.update(dict.fromkeys(dropout_rates(table), 0.0))
    vars(modules[path])[attribute] = _RATE
    try:
        yield
    finally:
        for key, table in tables.items():
            table.update(before[key])
