"""Low-rank adapters ΔW = A·B for arbitrary torch modules.

Names are imported lazily, so that :class:`LoRAConfig` can be used without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaw.lora.activations import ActivationInit as ActivationInit
    from deltaw.lora.activations import initialize_from_activations as initialize_from_activations
    from deltaw.lora.adapt import Summary as Summary
    from deltaw.lora.adapt import attach as attach
    from deltaw.lora.adapt import detach as detach
    from deltaw.lora.adapt import disabled as disabled
    from deltaw.lora.attachment import ParameterCount as ParameterCount
    from deltaw.lora.attachment import adapter_parameters as adapter_parameters
    from deltaw.lora.attachment import count_parameters as count_parameters
    from deltaw.lora.attachment import is_factor_B as is_factor_B
    from deltaw.lora.config import LoRAConfig as LoRAConfig
    from deltaw.lora.files import load_adapter as load_adapter
    from deltaw.lora.files import read_adapter as read_adapter
    from deltaw.lora.files import save_adapter as save_adapter
    from deltaw.lora.fingerprint import OtherBaseModelWarning as OtherBaseModelWarning
    from deltaw.lora.layers import DoRAConv as DoRAConv
    from deltaw.lora.layers import DoRAConv1D as DoRAConv1D
    from deltaw.lora.layers import DoRAConv1d as DoRAConv1d
    from deltaw.lora.layers import DoRAConv2d as DoRAConv2d
    from deltaw.lora.layers import DoRAConv3d as DoRAConv3d
    from deltaw.lora.layers import DoRAEmbedding as DoRAEmbedding
    from deltaw.lora.layers import DoRALayer as DoRALayer
    from deltaw.lora.layers import DoRALinear as DoRALinear
    from deltaw.lora.layers import LoRABias as LoRABias
    from deltaw.lora.layers import LoRABiasConv as LoRABiasConv
    from deltaw.lora.layers import LoRABiasConv1D as LoRABiasConv1D
    from deltaw.lora.layers import LoRABiasConv1d as LoRABiasConv1d
    from deltaw.lora.layers import LoRABiasConv2d as LoRABiasConv2d
    from deltaw.lora.layers import LoRABiasConv3d as LoRABiasConv3d
    from deltaw.lora.layers import LoRABiasLinear as LoRABiasLinear
    from deltaw.lora.layers import LoRAConv as LoRAConv
    from deltaw.lora.layers import LoRAConv1D as LoRAConv1D
    from deltaw.lora.layers import LoRAConv1d as LoRAConv1d
    from deltaw.lora.layers import LoRAConv2d as LoRAConv2d
    from deltaw.lora.layers import LoRAConv3d as LoRAConv3d
    from deltaw.lora.layers import LoRAEmbedding as LoRAEmbedding
    from deltaw.lora.layers import LoRALayer as LoRALayer
    from deltaw.lora.layers import LoRALinear as LoRALinear
    from deltaw.lora.layers_parts import LoRAParameter as LoRAParameter
    from deltaw.lora.layers_parts import TrainedTokens as TrainedTokens
    from deltaw.lora.layers_parts import TrainedTokensEmbedding as TrainedTokensEmbedding
    from deltaw.lora.layers_parts import TrainedTokensLinear as TrainedTokensLinear
    from deltaw.lora.merging import merge as merge
    from deltaw.lora.merging import unmerge as unmerge

# Public names by module.
_MODULES = {
    "activations": "ActivationInit initialize_from_activations",
    "adapt": "Summary attach detach disabled",
    "config": "LoRAConfig",
    "attachment": "ParameterCount adapter_parameters count_parameters is_factor_B",
    "files": "load_adapter read_adapter save_adapter",
    "fingerprint": "OtherBaseModelWarning",
    "layers": (
        "LoRALayer LoRALinear LoRAConv1D LoRAEmbedding LoRAConv LoRAConv1d LoRAConv2d LoRAConv3d LoRABias "
        "LoRABiasLinear LoRABiasConv1D LoRABiasConv LoRABiasConv1d LoRABiasConv2d LoRABiasConv3d DoRALayer "
        "DoRALinear DoRAConv1D DoRAEmbedding DoRAConv DoRAConv1d DoRAConv2d DoRAConv3d"
    ),
    "merging": "merge unmerge",
    "layers_parts": "LoRAParameter TrainedTokens TrainedTokensEmbedding TrainedTokensLinear",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'deltaw.lora' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"deltaw.lora.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
