"""Frozen layers with a quantized weight: int8 with a scale for each row, or blocks of few bits.

**int8:** W ≈ (Q · scale) ∘ columns,        y = (x ∘ columns)·(Q · scale)ᵀ + b

Both products of a training step, with Wᵀ and with W, read the same int8 weight Q. The inputs are quantized as
they come, with a scale for each token, or ``in_blocks`` for each 128 numbers of it. ``columns`` are
SmoothQuant scales (arXiv 2211.10438, eq. 3), one for each input. A ``Conv1D`` of transformers, whose weight
is (in, out), keeps it transposed.

**Blocks** (``kernels/block_linear.py``): the parameter ``weight`` holds the blocks' bytes, uint8 (rows, bytes of a
row), so that the model's state, its size and its device follow. A linear layer multiplies with the blocks as they
are; an embedding de-quantizes the rows of the tokens at hand.

This module knows its own arithmetic; which layers are quantized, how, and with what scales, is decided elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.kernels import quantize
from deltaw.kernels.block_linear import NF4_BLOCK, BlockWeight, quantize_nf4
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import note_base
from deltaw.lora.stored import BLOCK_BUFFERS, Scales, block_weight, frozen_linear


class _Int8(nn.Module):
    """What the int8-quantized layers share."""

    weight: Tensor
    bias: nn.Parameter
    weight_scale: Tensor
    weight_columns: Tensor | None
    in_blocks: bool

    def _quantize(self, of: nn.Module, weight: Tensor, columns: Tensor | None, in_blocks: bool) -> None:
        """Take the weight (out, in) in int8, its scales, and the bias of the layer that this one stands for."""
        nn.Module.__init__(self)
        with torch.no_grad():
            steps, scale = quantize.quantized_rows(weight if columns is None else weight.float() / columns)
        self.weight = nn.Parameter(steps.contiguous(), requires_grad=False)
        note_base(self.weight, of.get_parameter("weight"))
        bias = own_parameters(of).get("bias")
        self.register_parameter("bias", bias)
        if bias is not None:
            bias.requires_grad_(False)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_columns", columns)
        vars(self)["in_blocks"] = in_blocks or weight.shape[1] > quantize.LONGEST_SUM
        self.training = of.training

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        scales = Scales(self.weight_scale, self.weight_columns, self.in_blocks)
        return frozen_linear(input, self.weight, self.bias, scales)

    def plain_weight(self) -> Tensor:
        """The weight in the layout of the layer that was quantized, in fp32, dequantized."""
        wide = self.weight.float() * self.weight_scale[:, None]
        return wide if self.weight_columns is None else wide * self.weight_columns


class Int8Linear(_Int8, nn.Linear):
    """y = x·Wᵀ + b with W (out, in) in int8; frozen."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, columns: Tensor | None = None, in_blocks: bool = False) -> Int8Linear:
        """The layer with ``linear``'s weight quantized to int8 and its own bias.

        Args:
            columns: (in) fp32, what each input is multiplied with before it is rounded; None for ones.
            in_blocks: whether inputs have a scale for each 128 numbers, not for each token; inputs that are
                too long for one sum in int32 always have.
        """
        layer = cls.__new__(cls)
        layer._quantize(linear, linear.weight, columns, in_blocks)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        return layer


class Int8Conv1D(_Int8):
    """The same in the place of transformers' ``Conv1D``: y = x·W + b with Wᵀ (out, in) in int8; frozen."""

    nf: int
    nx: int

    @classmethod
    def from_conv1d(cls, module: nn.Module, columns: Tensor | None = None, in_blocks: bool = False) -> Int8Conv1D:
        """The layer with the weight of ``module`` transposed and quantized to int8, and its own bias.

        Args:
            columns, in_blocks: as in :meth:`Int8Linear.from_linear`.
        """
        layer = cls.__new__(cls)
        layer._quantize(module, module.get_parameter("weight").t(), columns, in_blocks)
        layer.nf, layer.nx = layer.weight.shape  # as Conv1D calls its outputs and inputs
        return layer

    def plain_weight(self) -> Tensor:
        """W (in, out) in fp32, dequantized."""
        return super().plain_weight().t()

    def extra_repr(self) -> str:
        """Its sizes, as ``Conv1D`` shows them."""
        return f"nf={self.nf}, nx={self.nx}"


class _Blocks(nn.Module):
    """What the layers with a weight in blocks share."""

    weight: Tensor
    block_format: str
    block_columns: int

    def _take(self, of: nn.Module, stored: BlockWeight, parameter: nn.Parameter | None = None) -> None:
        """Take the blocks of a weight, and what belongs to them."""
        nn.Module.__init__(self)
        self.weight = nn.Parameter(stored.data, requires_grad=False) if parameter is None else parameter
        vars(self).update(block_format=stored.format, block_columns=stored.columns)
        for name, tensor in zip(BLOCK_BUFFERS, stored.tensors[1:], strict=True):
            if tensor is not None:
                self.register_buffer(name, tensor, persistent=False)
        self.training = of.training

    @property
    def stored(self) -> BlockWeight:
        """The weight."""
        stored = block_weight(self)
        assert stored is not None
        return stored

    def plain_weight(self) -> Tensor:
        """W (rows, columns) in bf16, de-quantized."""
        return self.stored.dequantized(torch.bfloat16)

    def extra_repr(self) -> str:
        """The base layer's line with the format."""
        return f"{super().extra_repr()}, blocks={self.block_format}"


class BlockLinear(_Blocks, nn.Linear):
    """y = x·Wᵀ + b with W (out, in) in blocks; frozen."""

    @classmethod
    def of(cls, linear: nn.Linear, stored: BlockWeight, parameter: nn.Parameter | None = None) -> BlockLinear:
        """The layer in the place of ``linear``, with its bias.

        Args:
            parameter: the blocks' bytes as another layer has them already, where the two are tied.
        """
        layer = cls.__new__(cls)
        layer._take(linear, stored, parameter)
        layer.out_features, layer.in_features = stored.shape
        layer.register_parameter("bias", own_parameters(linear).get("bias"))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return frozen_linear(input, self.weight, self.bias, self.stored)


class BlockEmbedding(_Blocks, nn.Embedding):
    """y = W[ids] with W (tokens, dim) in blocks; frozen.

    Attributes:
        dtype: of the rows that it gives.
    """

    dtype: torch.dtype

    @classmethod
    def of(cls, embedding: nn.Embedding, stored: BlockWeight) -> BlockEmbedding:
        """The layer in the place of ``embedding``."""
        layer = cls.__new__(cls)
        layer._take(embedding, stored)
        layer.num_embeddings, layer.embedding_dim = stored.shape
        for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(layer, name, getattr(embedding, name))
        layer.dtype = embedding.weight.dtype
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        return self.stored.rows_at(input, torch.bfloat16).to(self.dtype)


def in_nf4(linear: nn.Linear) -> BlockLinear:
    """The layer with ``linear``'s weight rounded to NF4, and its own bias."""
    layer = BlockLinear.of(linear, quantize_nf4(linear.weight.detach()))
    note_base(layer.weight, linear.weight)  # it is the base model's, whatever it was rounded to
    return layer


def can_be_nf4(linear: nn.Linear) -> bool:
    """Whether a layer's rows divide into NF4's blocks."""
    return linear.weight.shape[-1] % NF4_BLOCK == 0
