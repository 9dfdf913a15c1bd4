"""Sites of dropout in a block, found by their effect.

:func:`deltaw.kernels.dropout.constant_dropout` replaces random masks by a factor of one half. If one rate of a block is
active in this mode, the model's code equals a fused block that applies the factor at the same sites.
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
from deltaw.runtime.block_roles import BlockRoles, DropoutRole, DropoutSite, dropout_rates
from deltaw.runtime.recognition import TOLERANCE, AttentionConfig, BlockCall, call_difference

_TEST_RATE = 0.5
_SITES: tuple[DropoutSite, ...] = get_args(DropoutSite)
# All combinations of sites, in the order of their sizes.
_COMBINATIONS = [sites for count in range(len(_SITES) + 1) for sites in itertools.combinations(_SITES, count)]


def with_dropout_sites(
    call: BlockCall, roles: BlockRoles, run: Callable[[nn.Module, BlockRoles, AttentionConfig], Callable[..., Any]]
) -> BlockRoles:
    """Add the sites of dropout to a verified description. Rates whose sites are not found are left out.

    Args:
        call: Recorded call of the block, in evaluation mode.
        run: Creates the replacement of a block from its description and attention parameters.
    """
    config = call.config or AttentionConfig(roles.attention.head_size**-0.5)
    modules = {path: module for path, module in call.block.named_modules() if not isinstance(module, LoRALayer)}
    found = []
    for path, module in modules.items():
        for attribute in dropout_rates(vars(module)):
            for sites in _COMBINATIONS:
                role = DropoutRole(path, attribute, sites)
                replacement = run(call.block, replace(roles, dropout=(role,)), config)
                with _only_active(modules, path, attribute), constant_dropout(), torch.random.fork_rng(devices=[]):
                    difference = call_difference(call, replacement)
                if difference < TOLERANCE:
                    found.append(role)
                    break
    return replace(roles, dropout=tuple(found))


@contextlib.contextmanager
def _only_active(modules: Mapping[str, nn.Module], path: str, attribute: str) -> Iterator[None]:
    """Context in which modules are in training mode with one active rate. All other rates are 0."""
    tables = [vars(module) for module in modules.values()]
    before = [{"training": table["training"], **dropout_rates(table)} for table in tables]
    for table in tables:
        table["training"] = True
        table.update(dict.fromkeys(dropout_rates(table), 0.0))
    vars(modules[path])[attribute] = _TEST_RATE
    try:
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update(values)
