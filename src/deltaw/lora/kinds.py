"""Choose the adapted layer for a module, and explain why a module cannot be adapted.

A module is adapted only if its computation is known: its type is a torch class, a subclass that does not override
``forward``, or one of several classes with an equivalent ``forward``. All other modules are rejected with an error
instead of being skipped silently.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from deltaw.errors import UserError
from deltaw.kernels.torch_modules import convolves_as, direct_buffers, direct_parameters, with_tensors
from deltaw.lora.adapted import AdaptedLayer
from deltaw.lora.layers import (
    Convolution,
    DoRAConv,
    DoRAConv1D,
    DoRAEmbedding,
    DoRALinear,
    LoRABiasConv,
    LoRABiasConv1D,
    LoRABiasLinear,
    LoRAConv,
    LoRAConv1D,
    LoRAEmbedding,
    LoRAForeignLinear,
    LoRALayer,
    LoRALinear,
)
from deltaw.lora.layers_parts import attention_refusal
from deltaw.lora.layers_quantized import BlockEmbedding, BlockLinear, Int8Conv1D, Int8Linear
from deltaw.lora.stored import describe_quantization, quantization_library

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_READ_MODULES = frozenset({"out_proj", "conv1d"})
"""Modules of Mamba blocks whose weights are read by fused kernels without calling the module."""

STEP_PROJECTION = "dt_proj"
"""Module of Mamba-1 blocks, also in hybrid models, whose weight is used without calling the module."""

PLAIN_LINEAR_CLASSES = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear whose forward is equivalent to x·Wᵀ + b."""


def is_conv1d(module: nn.Module) -> bool:
    """True for transformers' ``Conv1D``, also int8-quantized. Does not import transformers."""
    plain = type(module).__name__ == "Conv1D" and hasattr(module, "nf") and "weight" in direct_parameters(module)
    return plain or isinstance(module, Int8Conv1D)


def get_output_head(model: nn.Module) -> nn.Module | None:
    """Return the model's output head as defined by the model, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def get_input_embedding(model: nn.Module) -> nn.Module | None:
    """Return the model's input embedding as defined by the model, or None."""
    getter = getattr(model, "get_input_embeddings", None)
    return getter() if callable(getter) else None


def is_linear(module: nn.Module) -> bool:
    """True if 'all-linear' includes this type of module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer (see :func:`is_linear`)."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Int8Conv1D):
        return layer.nx, layer.nf
    inputs, outputs = layer.get_parameter("weight").shape
    return int(inputs), int(outputs)


def refusal(module: nn.Module) -> str | None:
    """Return the reason why ``module`` cannot be adapted, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, AdaptedLayer):
        return "it is already adapted"
    if isinstance(module, nn.MultiheadAttention):
        return attention_refusal(module)
    if (reason := _kind_refusal(module)) is not None:
        return reason
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced, for example by a device map or offloading"
    if (weight := direct_parameters(module).get("weight")) is None:
        return f"the weight of this {kind} is computed from other parameters (a parametrization)"
    if isinstance(weight, UninitializedParameter):
        return f"this {kind} has no size until its first forward"
    if weight.dtype not in FLOAT_DTYPES and describe_quantization(module) is None:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not a floating-point matrix"
    return None


def _kind_refusal(module: nn.Module) -> str | None:
    kind = type(module)
    if isinstance(module, nn.Linear):
        plain = kind.forward is nn.Linear.forward or kind.__name__ in PLAIN_LINEAR_CLASSES
        if plain or isinstance(module, Int8Linear | BlockLinear) or quantization_library(module) is not None:
            return None
        return f"{kind.__name__} overrides forward"
    if is_conv1d(module):
        return None
    if isinstance(module, BlockEmbedding):
        return f"its rows are stored in blocks of {module.block_format}, to which an embedding's update cannot be added"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an embedding with max_norm modifies its weight during lookup"
        if kind.forward is nn.Embedding.forward or _is_scaled_embedding(module):
            return None
        return f"{kind.__name__} overrides forward"
    for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, convolution):
            return None if convolves_as(kind, convolution) else f"{kind.__name__} overrides forward"
    return f"it is a {kind.__name__}, neither linear nor embedding nor convolution"


def _is_scaled_embedding(module: nn.Embedding) -> bool:
    """True if the embedding's forward only multiplies by its ``embed_scale``.

    Verified by comparing the output for one token with the scaled row of W, bit by bit.
    """
    if not type(module).__name__.endswith("WordEmbedding"):
        return False
    weight = direct_parameters(module).get("weight")
    if weight is not None and weight.is_meta:
        module = _materialized_copy(module)
        weight = direct_parameters(module)["weight"]
    scale = getattr(module, "embed_scale", None)
    scalar = isinstance(scale, int | float) or (isinstance(scale, torch.Tensor) and scale.numel() == 1)
    if not scalar or weight is None:
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    factor = scale.to(weight.dtype) if isinstance(scale, torch.Tensor) else float(scale or 0)
    with torch.no_grad():
        # Not torch.equal, which fake tensors of a dry run do not support, unlike bool().
        return bool((module(token)[0, 0] == weight[0] * factor).all())


def _materialized_copy(module: nn.Embedding) -> nn.Embedding:
    """Return a small embedding with values and with the forward of an embedding on the meta device."""
    buffers = {
        name: torch.full(buffer.shape, 3.0) if buffer is not None and buffer.is_meta else buffer
        for name, buffer in direct_buffers(module).items()
    }
    small = with_tensors(module, {"weight": nn.Parameter(torch.arange(1.0, 9.0).view(2, 4))}, buffers)
    small.padding_idx = None
    return small


def direct_read_reason(model: nn.Module, name: str, parent: nn.Module) -> str | None:
    """Return the reason why the module ``name`` is used without being called, or None if it is called."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter would have no effect"
    child_name = name.rpartition(".")[2]
    if child_name == STEP_PROJECTION and isinstance(getattr(parent, "A_log", None), nn.Parameter):
        return f"{type(parent).__name__} multiplies by this weight without calling the layer"
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    if child_name in KERNEL_READ_MODULES and ("mamba" in model_type or model_type in ("falcon_h1", "nemotron_h")):
        return f"{model_type}'s fused kernels read this weight directly"
    return None


def adapter_for(module: nn.Module, dora: bool = False, lora_bias: bool = False) -> type[LoRALayer]:
    """Return the class of the adapted layer for ``module``, for which :func:`refusal` returned None.

    Not for ``nn.MultiheadAttention``, which has two parameter updates and no adapted layer.
    """
    quantization = describe_quantization(module)
    if dora and quantization is not None:
        hint = "load the model with precision bf16 or fp32"
        raise UserError(f"DoRA needs the norms of the weights, which are {quantization}", location="dora", hint=hint)
    if quantization_library(module) is not None:
        if lora_bias:
            message = f"lora_bias does not support weights that are {quantization}"
            raise UserError(message, location="lora_bias", hint="remove it")
        return LoRAForeignLinear
    if isinstance(module, nn.Linear):
        return LoRABiasLinear if lora_bias else DoRALinear if dora else LoRALinear
    if isinstance(module, nn.Embedding):
        if lora_bias:
            message = "lora_bias does not support embeddings, whose update has no bias in PEFT's files"
            raise UserError(message, location="lora_bias", hint="remove the embedding from target_modules")
        return DoRAEmbedding if dora else LoRAEmbedding
    if isinstance(module, Convolution):
        return LoRABiasConv if lora_bias else DoRAConv if dora else LoRAConv
    return LoRABiasConv1D if lora_bias else DoRAConv1D if dora else LoRAConv1D
