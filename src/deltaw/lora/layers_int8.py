"""Frozen linear layers with an int8-quantized weight, and a scale for each row of it.

    W ≈ (Q · scale) ∘ columns,        y = (x ∘ columns)·(Q · scale)ᵀ + b

Both products of a training step, with Wᵀ and with W, read the same int8 weight Q. The inputs are quantized as
they come, with a scale for each token, or ``in_blocks`` for each 128 numbers of it. ``columns`` are
SmoothQuant scales (arXiv 2211.10438, eq. 3), one for each input. A ``Conv1D`` of transformers, whose weight
is (in, out), keeps it transposed.

This module knows its own arithmetic; which layers are quantized, and with what scales, is decided elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.kernels import quantize
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import note_base
from deltaw.lora.stored import Scales, frozen_linear


class Int8Linear(nn.Linear):
    """y = x·Wᵀ + b with W (out, in) in int8; frozen."""

    weight_scale: Tensor
    weight_columns: Tensor | None
    in_blocks: bool

    @classmethod
    def from_linear(cls, linear: nn.Linear, columns: Tensor | None = None, in_blocks: bool = False) -> Int8Linear:
        """The layer with ``linear``'s weight quantized to int8 and its own bias.

        Args:
            columns: (in) fp32, what each input is multiplied with before it is rounded; None for ones.
            in_blocks: whether inputs have a scale for each 128 numbers, not for each token; inputs that are
                too long for one sum in int32 always have.
        """
        layer = cls.__new__(cls)
        _quantize(layer, linear, linear.weight, columns, in_blocks)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        scales = Scales(self.weight_scale, self.weight_columns, self.in_blocks)
        return frozen_linear(input, self.weight, self.bias, scales)

    def plain_weight(self) -> Tensor:
        """W (out, in) in fp32, dequantized."""
        return plain_weight(self.weight, self.weight_scale, self.weight_columns)


class Int8Conv1D(nn.Module):
    """The same in the place of transformers' ``Conv1D``: y = x·W + b with Wᵀ (out, in) in int8; frozen."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    nf: int
    nx: int
    weight_scale: Tensor
    weight_columns: Tensor | None
    in_blocks: bool

    @classmethod
    def from_conv1d(cls, module: nn.Module, columns: Tensor | None = None, in_blocks: bool = False) -> Int8Conv1D:
        """The layer with the weight of ``module`` transposed and quantized to int8, and its own bias.

        Args:
            columns, in_blocks: as in :meth:`Int8Linear.from_linear`.
        """
        layer = cls.__new__(cls)
        _quantize(layer, module, module.get_parameter("weight").t(), columns, in_blocks)
        layer.nf, layer.nx = layer.weight.shape  # as Conv1D calls its outputs and inputs
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        scales = Scales(self.weight_scale, self.weight_columns, self.in_blocks)
        return frozen_linear(x, self.weight, self.bias, scales)

    def plain_weight(self) -> Tensor:
        """W (in, out) in fp32, dequantized."""
        return plain_weight(self.weight, self.weight_scale, self.weight_columns).t()

    def extra_repr(self) -> str:
        """Its sizes, as ``Conv1D`` shows them."""
        return f"nf={self.nf}, nx={self.nx}"


def _quantize(layer: nn.Module, of: nn.Module, weight: Tensor, columns: Tensor | None, in_blocks: bool) -> None:
    """Give a new layer the weight (out, in) in int8, its scales, and the bias of the layer it stands for."""
    nn.Module.__init__(layer)
    with torch.no_grad():
        steps, scale = quantize.quantized_rows(weight if columns is None else weight.float() / columns)
    layer.weight = nn.Parameter(steps.contiguous(), requires_grad=False)
    note_base(layer.weight, of.get_parameter("weight"))
    bias = own_parameters(of).get("bias")
    layer.register_parameter("bias", bias)
    if bias is not None:
        bias.requires_grad_(False)
    layer.register_buffer("weight_scale", scale)
    layer.register_buffer("weight_columns", columns)
    vars(layer)["in_blocks"] = in_blocks or weight.shape[1] > quantize.LONGEST_SUM
    layer.training = of.training


def plain_weight(weight: Tensor, scale: Tensor, columns: Tensor | None) -> Tensor:
    """A weight in int8 as fp32 numbers."""
    wide = weight.float() * scale[:, None]
    return wide if columns is None else wide * columns
