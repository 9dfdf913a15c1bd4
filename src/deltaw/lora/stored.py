"""Frozen weights that are stored as something else than a matrix of numbers, and their products.

Two forms (``layers_quantized``): int8 with scales, and blocks of few bits. A module keeps what
belongs to its weight in attributes and buffers of its own, so that whatever adopts the module has it too.
What multiplies with a frozen weight asks here for its form, and :func:`product` describes it to the kernels; a plain
weight has no form.

Knows modules' attributes and products; not how a weight came to its form.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.linear import Product, linear, linear_backward, rounds_gradients
from deltaw.kernels.torch_private import own_buffers, own_parameters


class Scales(NamedTuple):
    """Of a weight in int8: of its rows (out) and, or None, of its columns (in); and whether its inputs are
    rounded with a scale for each block of a row, see :func:`deltaw.kernels.linear.linear`."""

    rows: Tensor
    columns: Tensor | None
    in_blocks: bool = False


Stored: TypeAlias = Scales | BlockWeight

BLOCK_BUFFERS = ("weight_absmax", "weight_group_scale", "weight_offset")
"""What belongs to a weight in blocks, in the order of :class:`~deltaw.kernels.block_linear.BlockWeight`."""

LIBRARIES = ("bitsandbytes", "torchao")
"""Other libraries whose quantized tensors are known by their modules' names; they multiply themselves."""


def weight_scales(module: nn.Module) -> Scales | None:
    """The scales of a layer with an int8-quantized weight; None for any other."""
    if (scale := own_buffers(module).get("weight_scale")) is None:
        return None
    return Scales(scale, own_buffers(module).get("weight_columns"), vars(module).get("in_blocks", False))


def block_weight(module: nn.Module) -> BlockWeight | None:
    """The weight of a layer that keeps it in blocks; None for any other."""
    if (name := module.__dict__.get("block_format")) is None:  # older compilers of torch do not trace vars()
        return None
    buffers, data = own_buffers(module), own_parameters(module)["weight"]
    assert data is not None
    return BlockWeight(data.detach(), name, vars(module)["block_columns"], *map(buffers.get, BLOCK_BUFFERS))


def stored_form(module: nn.Module) -> Stored | None:
    """How a layer stores its weight; None for a plain matrix."""
    return block_weight(module) or weight_scales(module)


def library_of(module: nn.Module) -> str | None:
    """The library whose quantized tensor a linear layer's weight is; None for any other layer."""
    weight = own_parameters(module).get("weight")
    if not isinstance(module, nn.Linear) or weight is None:
        return None
    return library_of_tensor(weight)


def library_of_tensor(tensor: Tensor) -> str | None:
    """The library whose quantized tensor this is; None for any other tensor."""
    of = type(tensor).__module__.partition(".")[0]
    return of if of in LIBRARIES else None


def quantized_as(module: nn.Module) -> str | None:
    """What a layer's weight is, in words for a person; None for a plain matrix."""
    if (name := vars(module).get("block_format")) is not None:
        return f"kept in blocks of {name}"
    if weight_scales(module) is not None:
        return "int8-quantized"
    of = library_of(module)
    return None if of is None else f"quantized by {of}"


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight. A block-quantized weight has the shape of the matrix that it represents."""
    stored = block_weight(module)
    # The weight is no parameter during the comparison of gradients, but an fp32 copy of one.
    weight: Any = module.weight if stored is None else stored
    return tuple(weight.shape)


def count_numbers(model: nn.Module) -> int:
    """The parameters of a model as numbers: a weight in blocks counts as those that it stands for."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in own_parameters(module).items():
            if parameter is not None:
                shape = weight_shape(module) if name == "weight" else parameter.shape
                counts[id(parameter)] = math.prod(shape)
    return sum(counts.values())


def product(
    weight: Tensor,
    stored: Stored | None,
    by_column: bool = True,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Product:
    """What multiplies with a weight, by how it is stored."""
    if isinstance(stored, BlockWeight):
        return Product.of_blocks(stored, bias, lora_A, lora_B, scaling)
    scale, columns, in_blocks = stored or (None, None, False)
    return Product(weight, by_column, scale, columns, bias, lora_A, lora_B, scaling, in_blocks)


def multiply_backward(
    grad: Tensor, of: Product, added: Tensor | None = None, need_x: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`deltaw.kernels.linear.linear_backward`, in int8 where this process computes gradients of plain
    weights so."""
    plain = of.scale is None and of.format is None
    return linear_backward(grad, of, added, need_x, plain and need_x and rounds_gradients(grad, of))


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
    """x·Wᵀ + b for a stored weight; (..., in) to (..., out)."""
    return _Frozen.apply(x, weight, bias, stored)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
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
