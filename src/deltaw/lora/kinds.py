"""Which adapted layer stands in for which module, and why some modules cannot be adapted.

A module is adapted only where what it computes is known: its type is one of torch's, or a subclass that
leaves ``forward`` alone, or one of a few whose own ``forward`` does the same. Everything else is refused by
name, never skipped: an adapter that is silently not applied is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from deltaw.errors import UserError
from deltaw.kernels.torch_private import convolves_as, own_buffers, own_parameters, with_tensors
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
from deltaw.lora.stored import library_of, quantized_as

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
READ_BY_KERNELS = frozenset({"out_proj", "conv1d"})
"""Modules of Mamba blocks whose weights fused kernels read without calling the module."""

STEP_PROJECTION = "dt_proj"
"""Of Mamba blocks of the first kind, alone or in a hybrid: the block multiplies by its weight itself."""

PLAIN_LINEAR_CLASSES = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear that write x·Wᵀ + b out by hand, and do nothing else."""


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D``, int8-quantized or not, told without importing transformers."""
    plain = type(module).__name__ == "Conv1D" and hasattr(module, "nf") and "weight" in own_parameters(module)
    return plain or isinstance(module, Int8Conv1D)


def own_head(model: nn.Module) -> nn.Module | None:
    """The output head that a model names itself."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def own_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding that a model names itself."""
    getter = getattr(model, "get_input_embeddings", None)
    return getter() if callable(getter) else None


def is_linear(module: nn.Module) -> bool:
    """Whether 'all-linear' means this module."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a layer that :func:`is_linear` is true of."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Int8Conv1D):
        return layer.nx, layer.nf
    inputs, outputs = layer.get_parameter("weight").shape
    return int(inputs), int(outputs)


def refusal(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted, or None where it can be."""
    kind = type(module).__name__
    if isinstance(module, AdaptedLayer):
        return "it is adapted already"
    if isinstance(module, nn.MultiheadAttention):
        return attention_refusal(module)
    if (reason := _kind_refusal(module)) is not None:
        return reason
    if "forward" in vars(module):
        return f"the forward of this {kind} was replaced from outside, as device maps and offloading do"
    if (weight := own_parameters(module).get("weight")) is None:
        return f"the weight of this {kind} is computed from other parameters (a parametrization)"
    if isinstance(weight, UninitializedParameter):
        return f"this {kind} has no size before its first forward"
    if weight.dtype not in FLOATS and quantized_as(module) is None:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not a floating-point matrix"
    return None


def _kind_refusal(module: nn.Module) -> str | None:
    kind = type(module)
    if isinstance(module, nn.Linear):
        plain = kind.forward is nn.Linear.forward or kind.__name__ in PLAIN_LINEAR_CLASSES
        if plain or isinstance(module, Int8Linear | BlockLinear) or library_of(module) is not None:
            return None
        return f"{kind.__name__} has a forward of its own"
    if is_conv1d(module):
        return None
    if isinstance(module, BlockEmbedding):
        return f"its rows stay in blocks of {module.block_format}, which an update of an embedding cannot add to"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an embedding with max_norm rewrites its weight while it is read"
        if kind.forward is nn.Embedding.forward or _only_scales(module):
            return None
        return f"{kind.__name__} has a forward of its own"
    for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, convolution):
            return None if convolves_as(kind, convolution) else f"{kind.__name__} has a forward of its own"
    return f"it is a {kind.__name__}, neither linear nor embedding nor convolution"


def _only_scales(module: nn.Embedding) -> bool:
    """Whether an embedding's own forward does no more than multiply by its ``embed_scale``.

    Told by trying: the row of one token against W's row times the scale, to the bit.
    """
    if not type(module).__name__.endswith("WordEmbedding"):
        return False
    weight = own_parameters(module).get("weight")
    if weight is not None and weight.is_meta:
        module = _with_values(module)
        weight = own_parameters(module)["weight"]
    scale = getattr(module, "embed_scale", None)
    scalar = isinstance(scale, int | float) or (isinstance(scale, torch.Tensor) and scale.numel() == 1)
    if not scalar or weight is None:
        return False
    token = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    factor = scale.to(weight.dtype) if isinstance(scale, torch.Tensor) else float(scale or 0)
    with torch.no_grad():
        # Not torch.equal: in a dry run tensors are fake, which answer bool() but not that.
        return bool((module(token)[0, 0] == weight[0] * factor).all())


def _with_values(module: nn.Embedding) -> nn.Embedding:
    """A small embedding with the forward of one on the meta device, and numbers of its own."""
    buffers = {
        name: torch.full(buffer.shape, 3.0) if buffer is not None and buffer.is_meta else buffer
        for name, buffer in own_buffers(module).items()
    }
    small = with_tensors(module, {"weight": nn.Parameter(torch.arange(1.0, 9.0).view(2, 4))}, buffers)
    small.padding_idx = None
    return small


def read_directly(model: nn.Module, name: str, parent: nn.Module) -> str | None:
    """Why the module ``name`` is never called, though its weight is used; None where it is called."""
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it, so an adapter would not be seen"
    last = name.rpartition(".")[2]
    if last == STEP_PROJECTION and isinstance(getattr(parent, "A_log", None), nn.Parameter):
        return f"{type(parent).__name__} multiplies by this weight without calling the layer"
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    mamba = "mamba" in model_type or model_type in ("falcon_h1", "nemotron_h")
    if mamba and last in READ_BY_KERNELS:
        return f"{model_type}'s fused kernels read this weight directly"
    return None


def adapter_for(module: nn.Module, dora: bool = False, lora_bias: bool = False) -> Callable[..., LoRALayer]:
    """The constructor of the adapted layer over ``module``, for which :func:`refusal` gave None.

    Not for ``nn.MultiheadAttention``, which has two updates and no adapted layer.
    """
    kept = quantized_as(module)
    if dora and kept is not None:
        hint = "load the model with precision bf16 or fp32"
        raise UserError(f"DoRA needs the norms of its weights, which are {kept} here", where="dora", hint=hint)
    if library_of(module) is not None:
        if lora_bias:
            raise UserError(f"lora_bias is not for weights that are {kept}", where="lora_bias", hint="leave it out")
        return LoRAForeignLinear.from_linear
    if isinstance(module, nn.Linear):
        return (LoRABiasLinear if lora_bias else DoRALinear if dora else LoRALinear).from_linear
    if isinstance(module, nn.Embedding):
        if lora_bias:
            what = "lora_bias is not for embeddings, whose update has no bias in PEFT's files"
            raise UserError(what, where="lora_bias", hint="leave the embedding out of target_modules")
        return (DoRAEmbedding if dora else LoRAEmbedding).from_embedding
    if isinstance(module, Convolution):
        return (LoRABiasConv if lora_bias else DoRAConv if dora else LoRAConv).from_conv
    return (LoRABiasConv1D if lora_bias else DoRAConv1D if dora else LoRAConv1D).from_conv1d
