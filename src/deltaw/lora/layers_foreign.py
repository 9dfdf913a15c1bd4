"""Adapters on linear layers that another library has quantized: bitsandbytes' and torchao's.

Their product is their own: the layer's own forward, by torch's autograd, with the low-rank update added.

    y = layer(x) + scaling · dropout(x)·A·B

Knows how such layers are told; imports neither library.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltaw.errors import UserError
from deltaw.kernels.torch_private import adopt
from deltaw.lora import math as closed_form
from deltaw.lora.layers import LoRALayer
from deltaw.lora.stored import library_of


class LoRAForeignLinear(LoRALayer):
    """What is put before a foreign layer's class, whose forward it calls."""

    in_features: int
    out_features: int

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float = 1.0,
        *,
        dropout: float = 0.0,
        rslora: bool = False,
        init: str | None = "uniform",
        generator: torch.Generator | None = None,
    ) -> LoRAForeignLinear:
        """The adapted layer over the layer's own weight, whatever that is."""
        layer = adopt(_class_over(type(linear)), linear)
        shapes = ((linear.in_features, rank), (rank, linear.out_features))
        layer._begin(shapes, rank, alpha, dropout, rslora, init, generator)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features).

        Raises:
            UserError: gradients are wanted, and the library's product has none.
        """
        y: Tensor = super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad and not y.requires_grad:
            raise UserError(
                f"{library_of(self)}'s product with a {type(self.weight).__name__} gives its input no "
                "gradient, so what lies below it would be trained wrongly",
                where="a layer that is adapted",
                hint="quantize the weights alone, not what they are multiplied with, or use precision: nf4",
            )
        if not self.adapting:
            return y
        dropout = self.dropout if self.training else 0.0
        factors = self.lora_A, self.lora_B
        if (places := self.active_places) is not None:
            return y + closed_form.update_at(input, places, *factors, self.scaling, dropout).to(y.dtype)
        seen = F.dropout(input, dropout) if dropout > 0.0 else input
        update = (seen @ self.lora_A.to(input.dtype)) @ (self.lora_B * self.scaling).to(input.dtype)
        return y + update.to(y.dtype)

    def merge_refusal(self) -> str | None:
        """A sum with ΔW would have to be quantized again, by the library that did it first."""
        return f"its weight is quantized by {library_of(self)}; load the model unquantized to merge"

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """ΔW = scaling · (A·B)ᵀ of shape (out, in)."""
        return (self.lora_B.t() @ self.lora_A.t()).mul_(self.scaling)


_CLASSES: dict[type[nn.Module], type[LoRAForeignLinear]] = {}


def _class_over(base: type[nn.Module]) -> type[LoRAForeignLinear]:
    if base not in _CLASSES:
        _CLASSES[base] = type(f"LoRA{base.__name__}", (LoRAForeignLinear, base), {})
    return _CLASSES[base]
