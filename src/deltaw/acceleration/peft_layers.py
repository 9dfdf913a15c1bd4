"""PEFT's layers, read by their attributes without importing PEFT, and converted to deltaw's layers.

Names that PEFT does not document are only used here. A layer that lacks one of them is not converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import direct_modules, direct_parameters
from deltaw.lora.config import scaling as scaling_of
from deltaw.lora.kinds import adapter_for
from deltaw.lora.layers import LoRALayer
from deltaw.lora.peft_format import from_file_layout, to_file_layout

_LORA_MODULE = "peft.tuners.lora.layer"
_SAVED_MODULE = "ModulesToSaveWrapper"
_SUPPORTED_KINDS = frozenset({"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"})


class NotConvertible(Exception):
    """A layer or its state has no equivalent in deltaw. The message is the reason."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A trained tensor of a converted layer.

    Attributes:
        layer: The converted layer.
        attribute: Name of the parameter in ``layer``.
        source: PEFT's parameter, in the layout of its files.
    """

    layer: LoRALayer
    attribute: str
    source: nn.Parameter

    @property
    def parameter(self) -> nn.Parameter:
        """Parameter of the converted layer."""
        parameter: nn.Parameter = getattr(self.layer, self.attribute)
        return parameter

    def copy_value(self) -> None:
        """Copy the value of PEFT's parameter to the converted layer."""
        self.parameter.data.copy_(from_file_layout(self.source.data, self.attribute, self.layer))

    def gradient(self, gradient: Tensor) -> Tensor:
        """Return a gradient of the converted layer's parameter in the layout and type of PEFT's parameter."""
        converted = to_file_layout(gradient, self.attribute, self.layer)
        return converted.reshape(self.source.shape).to(self.source.dtype)


def is_peft_module(module: nn.Module) -> bool:
    """True for the classes of PEFT."""
    return type(module).__module__.partition(".")[0] == "peft"


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the state of a module of PEFT that determines its computation, except its tensors."""
    adapters = tuple(getattr(module, "active_adapters", ()))
    scaling = getattr(module, "scaling", None)
    values = tuple(scaling.get(name) for name in adapters) if isinstance(scaling, Mapping) else ()
    merged = tuple(getattr(module, "merged_adapters", ()))
    dropout = direct_modules(module).get("lora_dropout")
    modules = direct_modules(dropout) if dropout is not None else {}
    rates = tuple(getattr(modules.get(name), "p", 0.0) for name in adapters)
    return adapters, values, bool(getattr(module, "disable_adapters", False)), merged, rates


def inner_module(module: nn.Module) -> nn.Module | None:
    """Return the module that a wrapper of PEFT runs in its current state, or None if it adds an update.

    Raises:
        NotConvertible: if the module is not a known wrapper.
    """
    adapters, _, disabled, merged, _ = state_of(module)
    children = direct_modules(module)
    if type(module).__name__ == _SAVED_MODULE:
        copies = children.get("modules_to_save")
        active = [name for name in adapters if isinstance(copies, nn.ModuleDict) and name in copies]
        if disabled or not active:
            return children["original_module"]
        if len(active) > 1:
            raise NotConvertible("several adapters are active")
        assert isinstance(copies, nn.ModuleDict)
        return copies[active[0]]
    if type(module).__module__ != _LORA_MODULE or type(module).__name__ not in _SUPPORTED_KINDS:
        raise NotConvertible(f"PEFT's {type(module).__name__} has no equivalent")
    active = [name for name in adapters if name in _names_of_adapters(module)]
    if merged and (disabled or set(active) - set(merged)):
        raise NotConvertible("an adapter is merged")
    return children["base_layer"] if disabled or merged or not active else None


def _names_of_adapters(module: nn.Module) -> set[str]:
    children = direct_modules(module)
    tables = [table for name in ("lora_A", "lora_embedding_A") if (table := children.get(name)) is not None]
    return {name for table in tables for name in (*direct_modules(table), *direct_parameters(table))}


def convert_layer(module: nn.Module, base_layer: nn.Module) -> tuple[LoRALayer, list[Factor]]:
    """Convert an active layer of PEFT with one adapter.

    Args:
        module: PEFT's layer.
        base_layer: Its base layer or a copy of it, whose frozen parameters the result shares.

    Raises:
        NotConvertible: if the update has no equivalent.
    """
    active = [name for name in state_of(module)[0] if name in _names_of_adapters(module)]
    if len(active) != 1:
        raise NotConvertible("several adapters are active")
    (name,) = active
    variant = getattr(module, "lora_variant", {}).get(name)
    magnitudes = direct_modules(module).get("lora_magnitude_vector")
    dora = isinstance(magnitudes, nn.ModuleDict) and name in magnitudes
    if variant is not None and not (dora and type(variant).__name__.startswith("Dora")):
        raise NotConvertible(f"PEFT's {type(variant).__name__} has no equivalent")
    if any(parameter.requires_grad for parameter in base_layer.parameters()):
        raise NotConvertible("parameters of an adapted layer are trained")
    sources = _factors_of(module, name)
    rank = sources["lora_A"].shape[0]
    dropout = getattr(direct_modules(module)["lora_dropout"][name], "p", 0.0)  # type: ignore[index]
    scaling: float = module.scaling[name]  # type: ignore[assignment, index]
    try:
        kind = adapter_for(base_layer, dora=dora, lora_bias="lora_bias" in sources)
        layer = kind.from_module(base_layer, rank, scaling * rank, dropout=dropout, init=None)
    except UserError as error:
        raise NotConvertible(str(error)) from error
    layer.scaling = scaling
    if scaling_of(rank, layer.alpha, rslora=False) != scaling:
        layer.alpha = scaling * rank
    if dora:
        sources["lora_magnitude"] = magnitudes[name].weight  # type: ignore[index, assignment]
    factors = [Factor(layer, attribute, source) for attribute, source in sources.items()]
    for factor in factors:
        parameter = factor.parameter
        parameter.data = parameter.data.to(factor.source.dtype)
        parameter.requires_grad_(factor.source.requires_grad)
    return layer, factors


def _factors_of(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return PEFT's parameters of an adapter by the names of deltaw's."""
    children = direct_modules(module)
    embedding = children.get("lora_embedding_A")
    if embedding is not None and name in embedding:  # type: ignore[operator]
        return {f"lora_{key}": children[f"lora_embedding_{key}"][name] for key in "AB"}  # type: ignore[index, misc]
    layers = {f"lora_{key}": children[f"lora_{key}"][name] for key in "AB"}  # type: ignore[index]
    factors: dict[str, nn.Parameter] = {key: layer.weight for key, layer in layers.items()}
    if getattr(layers["lora_B"], "bias", None) is not None:
        factors["lora_bias"] = layers["lora_B"].bias
    return factors
