"""Projections of a fused block: an adapted or plain linear layer, its input, and its outputs by head."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.kernels import linear as products
from deltaw.kernels import quantize
from deltaw.kernels.dropout import apply_dropout
from deltaw.kernels.rows import Norm
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, is_conv1d
from deltaw.lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from deltaw.lora.stored import multiply_backward, product, stored_form
from deltaw.runtime.block_roles import by_column, norm_form


def make_norm(module: nn.Module) -> Norm | None:
    """Return the kernel form of a norm module, if supported."""
    form = norm_form(module, weightless=True)
    if form is None:
        return None
    tensors = direct_parameters(module)
    return Norm(tensors.get("weight"), tensors.get("bias"), form.eps, form.offset, form.centered)


class Projection:
    """A frozen linear layer of a block, with or without an update.

    Attributes:
        product: Layer in the form of the kernels.
        lora_A: Factor A of the update, if any.
        lora_B: Factor B of the update, if any.
        scaling: Scaling of the update. 1 without an update.
        dropout: Rate of dropout of the update's input.
        seed: Seed of the dropout of a call. None to apply none.
    """

    def __init__(self, module: nn.Module) -> None:
        weight = direct_parameters(module)["weight"]
        bias = direct_parameters(module).get("bias")
        assert weight is not None
        adapted = module if isinstance(module, LoRALayer) and module.adapting else None
        self.lora_A: Tensor | None = None if adapted is None else adapted.lora_A
        self.lora_B: Tensor | None = None if adapted is None else adapted.lora_B
        self.scaling: float = 1.0 if adapted is None else adapted.scaling
        self.dropout: float = adapted.dropout if adapted is not None and adapted.training else 0.0
        self.seed: Tensor | None = None
        update = self.lora_A, self.lora_B, self.scaling
        self.product = product(weight, stored_form(module), by_column(module), bias, *update)

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def __call__(self, x: Tensor, rounded: RoundedInput, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x·Wᵀ + b + s·(dropout(x)·A)·B + added for rows x (M, in), and dropout(x)·A."""
        if self.seed is None:
            return products.linear(x, self.product, added, *rounded.of(x, self.product))
        h = apply_dropout(x, self.seed, self.dropout) @ self._factor_A(x)
        update = h @ self._scaled_B(x)
        y, _ = products.linear(x, self._frozen, update, *rounded.of(x, self.product))
        return (y if added is None else y.add_(added)), h

    def backward(self, grad: Tensor, added: Tensor | None, need_x: bool) -> tuple[Tensor, Tensor]:
        """Return ∂L/∂x plus ``added``, and the narrow gradient for :meth:`factors_backward`."""
        if self.seed is None:
            return multiply_backward(grad, self.product, added, need_x)
        narrow = grad @ self._scaled_B(grad).t()
        if not need_x:
            return grad.new_empty(0), narrow
        update = apply_dropout(narrow @ self._factor_A(grad).t(), self.seed, self.dropout)
        d_x, _ = multiply_backward(grad, self._frozen, update)
        return (d_x if added is None else d_x.add_(added)), narrow

    @property
    def _frozen(self) -> products.LinearProduct:
        """The layer without its update."""
        return self.product._replace(lora_A=None, lora_B=None, scaling=1.0)

    def _factor_A(self, x: Tensor) -> Tensor:
        assert self.product.lora_A is not None
        return self.product.lora_A.to(x.dtype)

    def _scaled_B(self, x: Tensor) -> Tensor:
        assert self.product.lora_B is not None
        return (self.product.lora_B * self.product.scaling).to(x.dtype)

    def factors_backward(
        self, x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return ∂L/∂A and ∂L/∂B, or None for each if they are not trained."""
        if self.lora_A is None or not self.lora_A.requires_grad:
            return None, None
        backward = products.factors_backward if x.device.type == "cpu" else products.factor_products
        x = x if self.seed is None else apply_dropout(x, self.seed, self.dropout)
        return backward(x, h, grad, narrow, self.scaling)

    def with_seed(self, seed: Tensor) -> Projection:
        """Return a copy that applies dropout to the update's input."""
        copied = copy.copy(self)
        copied.seed = seed
        return copied

    def with_factors(self, lora_A: Tensor, scaled_B: Tensor) -> Projection:
        """Return a copy that multiplies by converted factors. Gradients are still those of the original ones."""
        copied = copy.copy(self)
        copied.product = self.product._replace(lora_A=lora_A, lora_B=scaled_B, scaling=1.0)
        return copied


class RoundedInput:
    """An input that is rounded to int8 once for all layers with the same rounding."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._columns: Tensor | None = None
        self._in_blocks = False
        self._rounded: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, layer: products.LinearProduct) -> tuple[Tensor | None, Tensor | None]:
        if layer.scale is None:
            return None, None
        is_valid = _is_same(self._columns, layer.smooth_scales) and self._in_blocks == layer.in_blocks
        if self._rounded is None or self._source is not x or not is_valid:
            self._source = x
            self._columns = layer.smooth_scales
            self._in_blocks = layer.in_blocks
            self._rounded = quantize.quantize_activations(x, layer.smooth_scales, layer.in_blocks)
        return self._rounded


def _is_same(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and left.data_ptr() == right.data_ptr())


def factors_of(layers: Sequence[Projection]) -> list[Tensor]:
    """Return A and B of each adapted layer, in order."""
    return [factor for layer in layers for factor in layer.factors or ()]


def can_project(layer: nn.Module) -> bool:
    """True if :class:`Projection` supports a layer: a frozen linear layer, plain or with low-rank factors."""
    kind = type(layer)
    if isinstance(layer, LoRALayer) and kind in (LoRALinear, LoRAConv1D):
        if layer.is_partially_active:
            return False
    elif not (kind is nn.Linear or kind.__name__ in PLAIN_LINEAR_CLASSES or is_conv1d(layer) or stored_form(layer)):
        return False
    weight = direct_parameters(layer).get("weight")
    bias = direct_parameters(layer).get("bias")
    return weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)


def select_rows(x: Tensor, indices: Tensor | None) -> Tensor:
    """Return the rows of x (T, …) at the indices, or all rows."""
    return x if indices is None else x.index_select(0, indices)


def head_views(y: Tensor, heads: int, key_heads: int, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Split outputs y (M, n) into queries (M, heads, d), keys and values (M, key heads, d), as views if possible.

    See :data:`deltaw.runtime.block_roles.Split`.
    """
    length = y.shape[0]
    if not grouped:
        return y.view(length, heads + 2 * key_heads, -1).split([heads, key_heads, key_heads], 1)  # type: ignore[return-value]
    group = heads // key_heads
    by_group = y.view(length, key_heads, group + 2, -1)
    q = by_group[:, :, 0] if group == 1 else by_group[:, :, :group].reshape(length, heads, -1)
    return q, by_group[:, :, group], by_group[:, :, group + 1]


def merge_heads(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    """Merge queries, keys and values into one tensor (M, n). Inverse of :func:`head_views`."""
    if not grouped:
        return torch.cat([q, k, v], 1).flatten(1)
    return torch.cat([q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]], 2).flatten(1)
