"""What the halves of a fused block are made of at work: projections with their low-rank updates, and norms.

Made from a block's modules as they are at the moment (see ``roles``), and thrown away when one of them
changes. Knows LoRA layers, stored weights and kernels; not blocks, nor autograd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deltaw.kernels import linear as products
from deltaw.kernels import quantize
from deltaw.kernels.rows import Norm
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES, is_conv1d
from deltaw.lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from deltaw.lora.stored import multiply_backward, product, stored_form
from deltaw.runtime.recognition import by_column, norm_form


def norm_of(module: nn.Module) -> Norm | None:
    """The norm that a module is; None where it is none that is known."""
    form = norm_form(module)
    if form is None:
        return None
    tensors = own_parameters(module)
    return Norm(tensors.get("weight"), tensors.get("bias"), form.eps, form.offset, form.centered)


class Projection:
    """A frozen linear layer of a block with its update, or without.

    Attributes:
        product: the layer as the kernels take it.
        lora_A, lora_B, scaling: of the update; None, None and 1 where there is none to add.
    """

    def __init__(self, module: nn.Module) -> None:
        weight, bias = own_parameters(module)["weight"], own_parameters(module).get("bias")
        assert weight is not None
        adapted = module if isinstance(module, LoRALayer) and module.adapting else None
        self.lora_A: Tensor | None = None if adapted is None else adapted.lora_A
        self.lora_B: Tensor | None = None if adapted is None else adapted.lora_B
        self.scaling: float = 1.0 if adapted is None else adapted.scaling
        update = self.lora_A, self.lora_B, self.scaling
        self.product = product(weight, stored_form(module), by_column(module), bias, *update)

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def __call__(self, x: Tensor, steps: Steps, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x·Wᵀ + b + s·(x·A)·B + added for rows x (M, in), and x·A."""
        return products.linear(x, self.product, added, *steps.of(x, self.product))

    def backward(self, grad: Tensor, added: Tensor | None, need_x: bool) -> tuple[Tensor, Tensor]:
        """∂L/∂x plus ``added``, and the narrow gradient that :meth:`factors_backward` wants."""
        return multiply_backward(grad, self.product, added, need_x)

    def factors_backward(
        self, x: Tensor, h: Tensor, grad: Tensor, narrow: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """∂L/∂A and ∂L/∂B; None where they are not trained."""
        if self.lora_A is None or not self.lora_A.requires_grad:
            return None, None
        return products.factors_backward(x, h, grad, narrow, self.scaling)


class Steps:
    """An input rounded to int8 once for all layers that take it alike."""

    def __init__(self) -> None:
        self._of: Tensor | None = None
        self._columns: Tensor | None = None
        self._in_blocks = False
        self._made: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, layer: products.Product) -> tuple[Tensor | None, Tensor | None]:
        if layer.scale is None:
            return None, None
        alike = _same(self._columns, layer.smooth_scales) and self._in_blocks == layer.in_blocks
        if self._made is None or self._of is not x or not alike:
            self._of, self._columns, self._in_blocks = x, layer.smooth_scales, layer.in_blocks
            self._made = quantize.quantized(x, layer.smooth_scales, layer.in_blocks)
        return self._made


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or one.data_ptr() == other.data_ptr()


def factors_of(layers: Sequence[Projection]) -> list[Tensor]:
    """A and B of each layer that has them, in order."""
    return [factor for layer in layers for factor in layer.factors or ()]


def can_project(layer: nn.Module) -> bool:
    """Whether :class:`Projection` computes what a layer does: a linear layer whose own weights are frozen,
    plain or with low-rank factors without dropout."""
    kind = type(layer)
    if isinstance(layer, LoRALayer) and kind in (LoRALinear, LoRAConv1D):
        if layer.acts_in_part or (layer.training and vars(layer)["dropout"] > 0.0):
            return False
    elif not (kind is nn.Linear or kind.__name__ in PLAIN_LINEAR_CLASSES or is_conv1d(layer) or stored_form(layer)):
        return False
    weight, bias = own_parameters(layer).get("weight"), own_parameters(layer).get("bias")
    return weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)


def at(x: Tensor, places: Tensor | None) -> Tensor:
    """The rows of (T, …) at these places, or all."""
    return x if places is None else x.index_select(0, places)


def head_views(y: Tensor, heads: int, key_heads: int, grouped: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (M, heads, d), keys and values (M, key heads, d) of one layer's outputs y (M, n); views where
    the layout allows it. See :data:`deltaw.runtime.recognition.Split`."""
    length = y.shape[0]
    if not grouped:
        by_head = y.view(length, heads + 2 * key_heads, -1)
        return by_head.split([heads, key_heads, key_heads], 1)  # type: ignore[return-value]
    group = heads // key_heads
    by_group = y.view(length, key_heads, group + 2, -1)
    q = by_group[:, :, 0] if group == 1 else by_group[:, :, :group].reshape(length, heads, -1)
    return q, by_group[:, :, group], by_group[:, :, group + 1]


def joined_heads(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    """The reverse of :func:`head_views`: one tensor (M, n)."""
    if not grouped:
        return torch.cat([q, k, v], 1).flatten(1)
    by_group = q.unflatten(1, (k.shape[1], -1))
    return torch.cat([by_group, k[:, :, None], v[:, :, None]], 2).flatten(1)
