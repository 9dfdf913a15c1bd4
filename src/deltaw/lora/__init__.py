"""Low-rank adapters ΔW = A·B for arbitrary torch modules.

Names are imported lazily, so that :class:`LoRAConfig` can be used without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaw.lora.activations import ActivationInit, initialize_from_activations
    from deltaw.lora.adapt import Summary, attach, detach, disabled
    from deltaw.lora.attachment import ParameterCount, adapter_parameters, count_parameters, is_factor_B, merge, unmerge
    from deltaw.lora.config import LoRAConfig
    from deltaw.lora.files import load_adapter, read_adapter, save_adapter
    from deltaw.lora.fingerprint import OtherBaseModelWarning
    from deltaw.lora.layers import (
        DoRAConv,
        DoRAConv1D,
        DoRAConv1d,
        DoRAConv2d,
        DoRAConv3d,
        DoRAEmbedding,
        DoRALayer,
        DoRALinear,
        LoRABias,
        LoRABiasConv,
        LoRABiasConv1D,
        LoRABiasConv1d,
        LoRABiasConv2d,
        LoRABiasConv3d,
        LoRABiasLinear,
        LoRAConv,
        LoRAConv1D,
        LoRAConv1d,
        LoRAConv2d,
        LoRAConv3d,
        LoRAEmbedding,
        LoRALayer,
        LoRALinear,
    )
    from deltaw.lora.layers_parts import LoRAParameter, TrainedTokens, TrainedTokensEmbedding, TrainedTokensLinear

__all__ = [
    "ActivationInit",
    "DoRAConv",
    "DoRAConv1D",
    "DoRAConv1d",
    "DoRAConv2d",
    "DoRAConv3d",
    "DoRAEmbedding",
    "DoRALayer",
    "DoRALinear",
    "LoRABias",
    "LoRABiasConv",
    "LoRABiasConv1D",
    "LoRABiasConv1d",
    "LoRABiasConv2d",
    "LoRABiasConv3d",
    "LoRABiasLinear",
    "LoRAConfig",
    "LoRAConv",
    "LoRAConv1D",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "LoRAParameter",
    "OtherBaseModelWarning",
    "ParameterCount",
    "Summary",
    "TrainedTokens",
    "TrainedTokensEmbedding",
    "TrainedTokensLinear",
    "adapter_parameters",
    "attach",
    "count_parameters",
    "detach",
    "disabled",
    "initialize_from_activations",
    "is_factor_B",
    "load_adapter",
    "merge",
    "read_adapter",
    "save_adapter",
    "unmerge",
]

# Public names by module.
_MODULES = {
    "activations": "ActivationInit initialize_from_activations",
    "adapt": "Summary attach detach disabled",
    "config": "LoRAConfig",
    "attachment": "ParameterCount adapter_parameters count_parameters is_factor_B merge unmerge",
    "files": "load_adapter read_adapter save_adapter",
    "fingerprint": "OtherBaseModelWarning",
    "layers": (
        "LoRALayer LoRALinear LoRAConv1D LoRAEmbedding LoRAConv LoRAConv1d LoRAConv2d LoRAConv3d LoRABias "
        "LoRABiasLinear LoRABiasConv1D LoRABiasConv LoRABiasConv1d LoRABiasConv2d LoRABiasConv3d DoRALayer "
        "DoRALinear DoRAConv1D DoRAEmbedding DoRAConv DoRAConv1d DoRAConv2d DoRAConv3d"
    ),
    "layers_parts": "LoRAParameter TrainedTokens TrainedTokensEmbedding TrainedTokensLinear",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'deltaw.lora' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"deltaw.lora.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
