"""Quantization of the linear layers of the blocks to NF4 (arXiv 2305.14314), one by one.

Embeddings, norms and the head are not quantized. The memory of each original weight is released immediately, so a
memory-mapped model never exists entirely in both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from deltaw.errors import first_names
from deltaw.kernels.block_linear import quantize_nf4 as rounded_nf4
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.fingerprint import record_base_digest
from deltaw.lora.kinds import is_conv1d
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_quantized import quantize_linear_nf4, supports_nf4
from deltaw.progress import track_progress
from deltaw.runtime.quantized_weights import LayerSlot, can_be_int8, is_plain, layer_slots, release_pages
from deltaw.runtime.recognition import blocks_of


@dataclass
class Nf4Report:
    """Result of a quantization to NF4.

    Attributes:
        layers: Number of linear layers in the blocks.
        unquantized: Names of layers that keep their weights.
    """

    layers: int = 0
    unquantized: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.layers:
            return "the blocks have no linear layers, so no weight is in NF4"
        summary = f"{self.layers - len(self.unquantized)} of {self.layers} layers are in NF4"
        if self.unquantized:
            summary += f"; not in NF4 because their input size is not a multiple of 64: {first_names(self.unquantized)}"
        return summary


def quantize_nf4(model: nn.Module) -> Nf4Report:
    """Replace the linear layers of the blocks by NF4 layers.

    Args:
        model: Frozen model without adapters.
    """
    layers = _linear_layers(model)
    report = Nf4Report(len(layers))
    with track_progress("rounding the weights to NF4", sum(layer.weight.numel() for _, layer in layers)) as advance:
        completed = 0
        for slot, layer in layers:
            if supports_nf4(layer):
                slot.replace(quantize_linear_nf4(layer))
                release_pages(layer.weight)
            else:
                report.unquantized.append(slot.name)
            completed += layer.weight.numel()
            advance(completed)
    return report


# Inputs above this value are multiplied in 16 bits by bitsandbytes' int8 layers (LLM.int8, arXiv 2208.07339).
INT8_OUTLIER_THRESHOLD = 6.0


def bitsandbytes_linear(linear: nn.Linear, precision: str, device: str) -> nn.Linear:
    """Create a bitsandbytes layer on ``device`` with the weight of ``linear`` quantized there, and its bias.

    Args:
        linear: Layer to quantize. Activations are in the dtype of its weight.
        precision: ``nf4``, with double quantization of the scales, or ``int8``.
        device: Device of the new layer. The bias is moved by the caller.
    """
    from bitsandbytes import nn as bnb

    weight = linear.weight.detach()
    sizes = (linear.in_features, linear.out_features)
    layer: Any
    if precision == "nf4":
        layer = bnb.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        layer.weight = bnb.Params4bit(weight, quant_type="nf4").to(device)
    else:
        options = {"has_fp16_weights": False, "threshold": INT8_OUTLIER_THRESHOLD}
        layer = bnb.Linear8bitLt(*sizes, **options, device="meta")
        layer.weight = bnb.Int8Params(weight, requires_grad=False).to(device)
    layer.register_parameter("bias", direct_parameters(linear).get("bias"))
    layer.training = linear.training
    record_base_digest(layer.weight, linear.weight)
    return cast(nn.Linear, layer)


class SimulatedLinear(nn.Linear):
    """Placeholder for a bitsandbytes layer in a dry run, with the tensors of its CUDA code. It has no values.

    Products of a few tokens need less, because they do not dequantize the weight.
    """

    simulated_library = "bitsandbytes"
    scales: Tensor

    def __init__(self, linear: nn.Linear, precision: str, device: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        values = linear.weight.detach().view(-1)
        is_nf4 = precision == "nf4"
        codes = values[: len(values) // 2].to(torch.uint8)[:, None] if is_nf4 else linear.weight.detach().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_parameter("bias", direct_parameters(linear).get("bias"))
        scales = values[: len(values) // 64].to(torch.uint8) if is_nf4 else values[: linear.out_features].float()
        self.register_buffer("scales", scales)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return cast(Tensor, _SimulatedProduct.apply(input, self))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in this type."""
        scales = self.scales.float()
        return scales.new_empty(self.out_features, self.in_features, dtype=dtype)


class _SimulatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SimulatedLinear) -> Tensor:
        ctx.layer = layer
        if layer.weight.dtype == torch.uint8:
            return nn.functional.linear(x, layer.dequantized(x.dtype), layer.bias)
        ctx.x = x  # also stored with activation checkpointing
        _codes = x.to(torch.int8)
        sums = x.new_empty(*x.shape[:-1], layer.out_features, dtype=torch.float32)
        y = sums.half().to(x.dtype)
        return y if layer.bias is None else y.add_(layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.layer.dequantized(grads[0].dtype), None


@torch.no_grad()
def quantize_with_bitsandbytes(
    model: nn.Module, precision: str, device: str, create: Callable[..., nn.Linear] = bitsandbytes_linear
) -> str:
    """Replace the linear layers of the blocks by bitsandbytes layers, which are quantized on ``device`` one by one.

    Args:
        model: Frozen model without adapters, on the CPU. Its other tensors are not moved.
        precision: ``nf4`` or ``int8``.
        device: Device of the new layers.
        create: Returns the new layer of a linear layer.

    Returns:
        Message for the user.
    """
    slots = layer_slots(*(blocks_of(model) or ("", nn.ModuleList())), lambda layer: is_plain(layer) or is_conv1d(layer))
    supports = supports_nf4 if precision == "nf4" else can_be_int8
    linears = {s.name: (s, s.layer) for s in slots if isinstance(s.layer, nn.Linear) and supports(s.layer)}
    for slot, linear in linears.values():
        slot.replace(create(linear, precision, device))
        release_pages(linear.weight)
    summary = f"{len(linears)} of {len(slots)} layers are in {precision}, with bitsandbytes"
    unquantized = [slot.name for slot in slots if slot.name not in linears]
    return f"{summary}; not supported: {first_names(unquantized)}" if unquantized else summary


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> int:
    """Round the bf16 weights of the blocks' linear layers to NF4 values, in place.

    Args:
        model: Frozen model. Adapters on it are not changed.

    Returns:
        Number of layers.
    """
    layers = [layer for _, layer in _linear_layers(model, adapted=True) if supports_nf4(layer)]
    for layer in layers:
        layer.weight.copy_(rounded_nf4(layer.weight.to(torch.bfloat16)).dequantized(torch.bfloat16))
    return len(layers)


def _linear_layers(model: nn.Module, adapted: bool = False) -> list[tuple[LayerSlot, nn.Linear]]:
    """Return the linear layers of the blocks, and with ``adapted`` also base layers of adapted ones."""
    block_list = blocks_of(model)
    if block_list is None:
        return []
    slots = layer_slots(*block_list, lambda layer: is_plain(layer) or (adapted and type(layer) is LoRALinear))
    return [(slot, slot.layer) for slot in slots if isinstance(slot.layer, nn.Linear)]
