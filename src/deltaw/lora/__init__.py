"""The heart of deltaw: ΔW = A·B on any torch module. It knows no text, no data and no training."""

from deltaw.lora.adapt import Summary, attach, detach, disabled
from deltaw.lora.config import LoRAConfig
from deltaw.lora.count import ParameterCount, adapter_parameters, count_parameters
from deltaw.lora.files import OtherBaseModelWarning, load_adapter, read_adapter, save_adapter
from deltaw.lora.layers import LoRAConv1D, LoRAEmbedding, LoRALayer, LoRALinear
from deltaw.lora.layers_conv import LoRAConv, LoRAConv1d, LoRAConv2d, LoRAConv3d
from deltaw.lora.merge import merge, unmerge

__all__ = [
    "LoRAConfig",
    "LoRAConv",
    "LoRAConv1D",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "OtherBaseModelWarning",
    "ParameterCount",
    "Summary",
    "adapter_parameters",
    "attach",
    "count_parameters",
    "detach",
    "disabled",
    "load_adapter",
    "merge",
    "read_adapter",
    "save_adapter",
    "unmerge",
]
