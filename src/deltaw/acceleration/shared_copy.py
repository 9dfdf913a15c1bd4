"""Copies of a model's modules that share its tensors and run with deltaw's layers, attention and blocks.

A script keeps its model. Its modules, names, parameters and hooks are unchanged, and only ``forward`` of the model and
of its backbone are replaced. They run a copy, whose gradients reach the parameters of the script's model through one
node of the autograd graph (:mod:`deltaw.acceleration.bridge`).

A copy is valid for one state of the model: active adapters, trained parameters and the type that products run in. The
factors of PEFT's adapters have another layout, so their values are copied before each call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from deltaw.acceleration.peft_layers import (
    Factor,
    NotConvertible,
    convert_layer,
    inner_module,
    is_peft_module,
    state_of,
)
from deltaw.acceleration.replaced_method import ReplacedMethod
from deltaw.kernels.torch_modules import are_hooked, cast_module, direct_modules, direct_parameters
from deltaw.kernels.torch_private import version_of
from deltaw.lora.layers import LoRALayer
from deltaw.runtime.block_roles import dropout_rates

# Hooks of transformers and PEFT that set requires_grad of the embeddings for reentrant checkpointing. Copies do not
# need them.
_HARMLESS_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Number of values of a parameter that are compared to detect a change. A change of other values is not detected.
SAMPLED_VALUES = 8
# Attributes that scripts change after a copy is created.
_FLAGS = ("training", "gradient_checkpointing")
# Attribute of transformers with the function that checkpoints a block. Reentrant checkpointing does not support
# torch.autograd.grad, so copies use the other one.
_CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
_checkpoint_without_reentry = functools.partial(checkpoint, use_reentrant=False)


class SharedCopy:
    """Copy of a model for one of its states.

    Args:
        source: The script's model.
        dtype: Type of the frozen parameters, or None for the type of each parameter. Used for autocast. Trained
            parameters keep their type.
        casts: Frozen parameters in ``dtype`` by the original, shared by all copies of the model.
        without_adapters: True to copy the base model of PEFT's layers.

    Attributes:
        model: The copy.
        factors: Trained tensors of PEFT's layers.

    Raises:
        NotConvertible: if a part of the model cannot be copied.
    """

    def __init__(
        self,
        source: PreTrainedModel,
        dtype: torch.dtype | None,
        casts: dict[int, tuple[Any, nn.Parameter]],
        *,
        without_adapters: bool = False,
    ) -> None:
        self.factors: list[Factor] = []
        self._source = source
        self._without_adapters = without_adapters
        self._dtype = dtype
        self._casts = casts
        self._copies: dict[int, nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self._pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contexts = contextlib.ExitStack()
        model = self._copy(source)
        assert isinstance(model, PreTrainedModel)
        self.model = model

    def enter(self, context: AbstractContextManager[None]) -> None:
        """Enter a context that ends with :meth:`close`. A backward pass that recomputes blocks needs it as well."""
        self._contexts.enter_context(context)

    def close(self) -> None:
        """Leave the contexts of the copy."""
        self._contexts.close()

    def update(self) -> None:
        """Copy values of factors and flags of modules from the script's model."""
        for source, copied in self._pairs:
            for name in _FLAGS:
                if name in source:
                    copied[name] = source[name]
            copied.update(dropout_rates(source))
            if _CHECKPOINT_FUNCTION in source:
                copied[_CHECKPOINT_FUNCTION] = _checkpoint_without_reentry
        for factor in self.factors:
            factor.copy_value()

    def leaves(self, part: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, Factor | None]]:
        """Return the trained parameters of a part of the copy, with those of the script's model."""
        by_id = {id(factor.parameter): factor for factor in self.factors}
        result: list[tuple[nn.Parameter, nn.Parameter, Factor | None]] = []
        for parameter in part.parameters():
            if parameter.requires_grad:
                factor = by_id.get(id(parameter))
                result.append((parameter, parameter if factor is None else factor.source, factor))
        return result

    def replace_in_source(self) -> list[nn.Module]:
        """Replace layers of the script's model by those that replaced their copies.

        Returns:
            The layers of PEFT whose base layer was replaced.
        """
        wrappers = []
        for parent in list(self._source.modules()):
            copied = self._copies.get(id(parent))
            if copied is None or is_peft_module(parent):
                continue
            for name, child in direct_modules(parent).items():
                replacement = direct_modules(copied)[name]
                if child is None or replacement is None or replacement is self._copies[id(child)]:
                    continue
                if is_peft_module(child):
                    wrappers.append(child)
                    direct_modules(child)["base_layer"] = replacement
                else:
                    direct_modules(parent)[name] = replacement
        return wrappers

    def _copy(self, module: nn.Module) -> nn.Module:
        if id(module) not in self._copies:
            self._copies[id(module)] = self._convert(module) if is_peft_module(module) else self._copy_plain(module)
        return self._copies[id(module)]

    def _convert(self, module: nn.Module) -> nn.Module:
        base_layer = direct_modules(module).get("base_layer")
        if self._without_adapters and base_layer is not None:
            return self._copy(base_layer)
        inner = inner_module(module)
        if inner is not None:
            return self._copy(inner)
        assert base_layer is not None
        layer, factors = convert_layer(module, self._copy(base_layer))
        self._pairs.append((vars(module), vars(layer)))
        self.factors += factors
        return layer

    def _copy_plain(self, module: nn.Module) -> nn.Module:
        copied = cast_module(type(module), module)
        table = vars(copied)
        forward = table.pop("forward", None)
        if forward is not None and module is not self._source and not isinstance(forward, ReplacedMethod):
            raise NotConvertible(f"the forward method of a {type(module).__name__} was replaced")
        for name in _HOOK_TABLES:
            if name in table:
                table[name] = type(table[name])()
        for name, value in list(table.items()):
            if isinstance(value, PretrainedConfig):
                table[name] = copy.deepcopy(value, self._configs)
        children = direct_modules(copied)
        children.update({name: self._copy(child) for name, child in children.items() if child is not None})
        parameters = direct_parameters(copied)
        factors = module.trained if isinstance(module, LoRALayer) else ()
        others = {name: p for name, p in parameters.items() if p is not None and name not in factors}
        parameters.update({name: self._cast(p) for name, p in others.items()})
        self._pairs.append((vars(module), table))
        return copied

    def _cast(self, parameter: nn.Parameter) -> nn.Parameter:
        if self._dtype is None or parameter.dtype == self._dtype or not parameter.is_floating_point():
            return parameter
        if parameter.requires_grad:
            return parameter
        key = _value_key(parameter, self._dtype)
        cached = self._casts.get(id(parameter))
        if cached is None or cached[0] != key:
            cached = key, nn.Parameter(parameter.data.to(self._dtype), requires_grad=False)
            self._casts[id(parameter)] = cached
        return cached[1]


def state_key(model: nn.Module, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """Return a key of everything that a copy depends on, except flags and the values of shared tensors.

    Args:
        dtype: Type of the frozen parameters, if their values are converted to it.
    """
    parameters = tuple((id(p), p.requires_grad, p.dtype, _value_key(p, dtype)) for p in model.parameters())
    modules = tuple((id(m), type(m), m is model or "forward" in vars(m)) for m in model.modules())
    states = tuple(state_of(module) for module in model.modules() if is_peft_module(module))
    return dtype, parameters, modules, states


def frozen_values(model: nn.Module) -> tuple[Any, ...]:
    """Return a key that changes with the values of the frozen parameters."""
    return tuple(_sampled(p) for p in model.parameters() if not p.requires_grad)


def _value_key(parameter: nn.Parameter, dtype: torch.dtype | None) -> tuple[Any, ...] | None:
    """Return a key that changes with the values of a parameter that is copied, or None if it is shared."""
    return None if dtype is None or parameter.requires_grad or parameter.dtype == dtype else _sampled(parameter)


def _sampled(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Return a key that changes with the values: address, version, and some values, because code that changes ``data``
    leaves the version unchanged.
    """
    values = parameter.detach().reshape(-1)
    step = max(1, len(values) // SAMPLED_VALUES)
    return parameter.data_ptr(), -1 if parameter.is_inference() else version_of(parameter), *values[::step].tolist()


def is_observed(model: nn.Module) -> bool:
    """True if modules inside a model have hooks, which would not be called."""
    tables = [vars(module) for module in model.modules() if module is not model]
    return are_hooked(tables) and any(_hooks_of(table) for table in tables)


def _hooks_of(table: Mapping[str, Any]) -> list[Any]:
    hooks: Iterator[Any] = (hook for name in _HOOK_TABLES for hook in table.get(name, {}).values())
    return [hook for hook in hooks if getattr(hook, "__name__", "") not in _HARMLESS_HOOKS]


def trains_base(model: PreTrainedModel) -> bool:
    """True if parameters of a copy's backbone or output head other than low-rank factors are trained."""
    factors = {id(p) for layer in model.modules() if isinstance(layer, LoRALayer) for p in layer.parameters()}
    head = model.get_output_embeddings()
    parts = [model.base_model, *([] if head is None else [head])]
    return any(p.requires_grad and id(p) not in factors for part in parts for p in part.parameters())


def dtype_of_products(model: nn.Module, device_type: str) -> torch.dtype | None:
    """Return the type of autocast, or None if it is off or changes nothing."""
    if not torch.is_autocast_enabled(device_type):
        return None
    dtype: torch.dtype = torch.get_autocast_dtype(device_type)
    adapted = any(is_peft_module(module) or isinstance(module, LoRALayer) for module in model.modules())
    wide = any(p.dtype == torch.float32 and not (adapted and p.requires_grad) for p in model.parameters())
    return dtype if wide else None
