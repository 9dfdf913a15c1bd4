"""Private names of torch for modules: direct children, parameters and hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from deltaw.errors import look_up
from deltaw.kernels.torch_private import ModuleType, missing_name_error

_TABLES = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
_HAS_TABLES = all(look_up(nn.Module(), name) is not None for name in _TABLES)
_HAS_HOOKS = all(look_up(nn.Module(), name) is not None for name in _HOOKS)


def direct_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters registered directly in a module, by name. Unset names map to None."""
    return module._parameters


def direct_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers registered directly in a module, by name."""
    return module._buffers


def direct_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the direct submodules of a module, by name."""
    return module._modules


def _parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    unset: dict[str, nn.Parameter | None] = {k: None for k in ("weight", "bias") if getattr(module, k, module) is None}
    return {**unset, **dict(module.named_parameters(recurse=False, remove_duplicate=False))}


def _buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    return dict(module.named_buffers(recurse=False, remove_duplicate=False))


def _modules_of(module: nn.Module) -> dict[str, nn.Module | None]:
    return dict(module.named_children())


if not _HAS_TABLES:
    direct_parameters = _parameters_of
    direct_buffers = _buffers_of
    direct_modules = _modules_of


def cast_module(cls: type[ModuleType], module: nn.Module) -> ModuleType:
    """Create an object of ``cls`` with the attributes of ``module``.

    Parameters, buffers and submodules are in new tables. Hooks are shared.

    Raises:
        UserError: if nn.Module of this torch version has a different structure.
    """
    if not _HAS_TABLES:
        raise missing_name_error("an adapter", "the tables of nn.Module")
    copied = cls.__new__(cls)
    vars(copied).update(vars(module))
    for table in _TABLES:
        vars(copied)[table] = dict(vars(module)[table])
    return copied


def with_tensors(
    module: ModuleType, parameters: Mapping[str, nn.Parameter], buffers: Mapping[str, Tensor | None] | None = None
) -> ModuleType:
    """Return a copy of a module with these parameters, and these buffers or the original ones.

    Raises:
        UserError: as for :func:`cast_module`.
    """
    if not _HAS_TABLES:
        raise missing_name_error("a copy of a module", "the tables of nn.Module")
    copied = copy.copy(module)
    vars(copied)["_parameters"] = dict(parameters)
    vars(copied)["_buffers"] = dict(direct_buffers(module) if buffers is None else buffers)
    return copied


def with_modules(module: ModuleType, modules: Mapping[str, nn.Module]) -> ModuleType:
    """Return a copy of a module in which these direct submodules replace the original ones.

    Raises:
        UserError: as for :func:`cast_module`.
    """
    if not _HAS_TABLES:
        raise missing_name_error("a copy of a module", "the tables of nn.Module")
    copied = copy.copy(module)
    vars(copied)["_modules"] = {**direct_modules(module), **modules}
    return copied


def share_parameters(module: nn.Module, table: dict[str, nn.Parameter | None]) -> None:
    """Replace a module's parameter table by ``table``, which other modules share.

    Raises:
        UserError: as for :func:`cast_module`.
    """
    if not _HAS_TABLES:
        raise missing_name_error("train.sharding: base", "the tables of nn.Module")
    table.update(direct_parameters(module))
    vars(module)["_parameters"] = table


def are_hooked(tables: Iterable[Mapping[str, Any]]) -> bool:
    """True if any module has a hook. Modules are given by their ``vars``. Always True without the private names."""
    if not _HAS_HOOKS:
        return True
    return any(table["_forward_hooks"] or table["_forward_pre_hooks"] or table["_backward_hooks"] for table in tables)


def remove_forward_hooks(module: nn.Module, ids: Iterable[int]) -> None:
    """Remove forward hooks by the ids of their handles. Hooks that are not found are ignored."""
    for hook_id in ids:
        for name in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called"):
            vars(module).get(name, {}).pop(hook_id, None)


def convolves_as(cls: type[nn.Module], convolution: Any) -> bool:
    """True if a class computes the same as torch's convolution class."""
    implementations = (look_up(module_class, "_conv_forward") for module_class in (cls, convolution))
    return len(set(implementations)) == 1 and cls.forward is convolution.forward


def inside_compiled(model: nn.Module) -> nn.Module | None:
    """Return the module wrapped by ``torch.compile``, or None if the module is not compiled."""
    return direct_modules(model).get("_orig_mod")
