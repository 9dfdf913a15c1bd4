"""Quantized storage of frozen weights, and products with them.

A weight is stored as int8 with scales or as blocks of few bits (``layers_quantized``). A module has all parts of its
weight in attributes and buffers, so that an adapted layer created from the module has them too. :func:`product`
describes a weight to the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.linear import LinearProduct, linear, linear_backward, uses_int8_gradients
from deltaw.kernels.torch_modules import direct_buffers, direct_parameters


class Scales(NamedTuple):
    """Scales of an int8 weight.

    Attributes:
        rows: (out) scales of the rows.
        columns: (in) scales of the columns, or None.
        in_blocks: True if inputs are quantized with a scale per block of a row (see
            :func:`deltaw.kernels.linear.linear`).
    """

    rows: Tensor
    columns: Tensor | None
    in_blocks: bool = False


StoredWeight: TypeAlias = Scales | BlockWeight

BLOCK_BUFFERS = ("weight_absmax", "weight_group_scale", "weight_offset")
"""Buffers of a weight in blocks, in the order of :class:`~deltaw.kernels.block_linear.BlockWeight`."""

QUANTIZATION_LIBRARIES = ("bitsandbytes", "torchao")
"""Other quantization libraries, identified by module name. Their tensors implement the products."""


def weight_scales(module: nn.Module) -> Scales | None:
    """Return the scales of a layer with an int8 weight, or None for other layers."""
    if (scale := direct_buffers(module).get("weight_scale")) is None:
        return None
    return Scales(scale, direct_buffers(module).get("weight_columns"), vars(module).get("in_blocks", False))


def block_weight(module: nn.Module) -> BlockWeight | None:
    """Return the weight of a layer stored in blocks, or None for other layers."""
    if (name := module.__dict__.get("block_format")) is None:  # torch.compile of older versions does not trace vars()
        return None
    buffers = direct_buffers(module)
    data = direct_parameters(module)["weight"]
    assert data is not None
    return BlockWeight(data.detach(), name, vars(module)["block_columns"], *map(buffers.get, BLOCK_BUFFERS))


def stored_form(module: nn.Module) -> StoredWeight | None:
    """Return the quantized weight or scales of a layer, or None for a plain matrix."""
    return block_weight(module) or weight_scales(module)


def quantization_library(module: nn.Module) -> str | None:
    """Return the library that quantized a linear layer's weight, or None."""
    weight = direct_parameters(module).get("weight")
    if not isinstance(module, nn.Linear) or weight is None:
        return None
    return getattr(type(module), "simulated_library", None) or tensor_quantization_library(weight)


def tensor_quantization_library(tensor: Tensor) -> str | None:
    """Return the library that quantized a tensor, or None."""
    package = type(tensor).__module__.partition(".")[0]
    return package if package in QUANTIZATION_LIBRARIES else None


def describe_quantization(module: nn.Module) -> str | None:
    """Describe the quantization of a layer's weight for messages, or return None for a plain matrix."""
    if (name := vars(module).get("block_format")) is not None:
        return f"stored in blocks of {name}"
    if weight_scales(module) is not None:
        return "int8-quantized"
    library = quantization_library(module)
    return None if library is None else f"quantized by {library}"


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight. A quantized weight has the shape of the matrix that it represents."""
    if quantization_library(module) is not None and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    stored = block_weight(module)
    # While gradients are compared, the weight is an fp32 copy and not a parameter.
    weight: Any = module.weight if stored is None else stored
    return tuple(weight.shape)


def count_logical_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model. A quantized weight counts with the size of the matrix that it
    represents.
    """
    counts: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in direct_parameters(module).items():
            if parameter is not None:
                counts[id(parameter)] = math.prod(weight_shape(module) if name == "weight" else parameter.shape)
    return sum(counts.values())


def product(
    weight: Tensor,
    stored: StoredWeight | None,
    by_column: bool = True,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> LinearProduct:
    """Describe the product with a weight to the kernels."""
    if isinstance(stored, BlockWeight):
        return LinearProduct.from_blocks(stored, bias, lora_A, lora_B, scaling)
    scale, columns, in_blocks = stored or (None, None, False)
    return LinearProduct(weight, by_column, scale, columns, bias, lora_A, lora_B, scaling, in_blocks)


def multiply_backward(
    grad: Tensor, product: LinearProduct, added: Tensor | None = None, need_x: bool = True
) -> tuple[Tensor, Tensor]:
    """Call :func:`deltaw.kernels.linear.linear_backward`, in int8 if enabled for gradients of plain weights."""
    plain = product.scale is None and product.format is None
    return linear_backward(grad, product, added, need_x, plain and need_x and uses_int8_gradients(grad, product))


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stored: StoredWeight) -> Tensor:
    """Return x·Wᵀ + b for a quantized weight; (..., in) to (..., out)."""
    apply: Callable[..., Tensor] = _FrozenLinear.apply
    return apply(x, weight, bias, stored)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stored: StoredWeight) -> Tensor:
        y, _ = linear(x.reshape(-1, x.shape[-1]), product(weight, stored, bias=bias))
        ctx.save_for_backward(weight)
        ctx.stored = stored
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        dx = d_bias = None
        if ctx.needs_input_grad[0]:
            dx, _ = multiply_backward(flat, product(weight, ctx.stored))
            dx = dx.view(*grads[0].shape[:-1], dx.shape[-1])
        if ctx.needs_input_grad[2]:
            d_bias = flat.sum(0).to(ctx.bias_dtype)
        return dx, None, d_bias, None
