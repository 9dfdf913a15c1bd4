"""Frozen layers whose weight stays in blocks of few bits (``kernels/block_linear.py``).

The parameter ``weight`` holds the blocks' bytes, uint8 (rows, bytes of a row), so that the model's state, its
size and its device follow. A linear layer multiplies with the blocks as they are; an embedding de-quantizes
the rows of the tokens at hand. Numbers outside of the weights are of the type ``dtype``.

Knows its own arithmetic; where the blocks come from is decided elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.kernels.block_linear import NF4_BLOCK, BlockWeight, quantize_nf4
from deltaw.kernels.torch_private import own_parameters
from deltaw.lora.fingerprint import note_base
from deltaw.lora.stored import block_weight, frozen_linear


class BlockLinear(nn.Linear):
    """y = x·Wᵀ + b with W (out, in) in blocks; frozen."""

    block_format: str
    block_columns: int

    @classmethod
    def of(cls, linear: nn.Linear, stored: BlockWeight, parameter: nn.Parameter | None = None) -> BlockLinear:
        """The layer in the place of ``linear``, with its bias.

        Args:
            parameter: the blocks' bytes as another layer has them already, where the two are tied.
        """
        layer = cls.__new__(cls)
        _take(layer, linear, stored, parameter)
        layer.out_features, layer.in_features = stored.shape
        bias = own_parameters(linear).get("bias")
        layer.register_parameter("bias", bias)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        stored = block_weight(self)
        assert stored is not None
        return frozen_linear(input, self.weight, self.bias, stored)

    def plain_weight(self) -> Tensor:
        """W (out, in) in bf16, de-quantized."""
        return _plain(self)

    def extra_repr(self) -> str:
        """The base layer's line with the format."""
        return f"{super().extra_repr()}, blocks={self.block_format}"


class BlockEmbedding(nn.Embedding):
    """y = W[ids] with W (tokens, dim) in blocks; frozen.

    Attributes:
        dtype: of the rows that it gives.
    """

    block_format: str
    block_columns: int
    dtype: torch.dtype

    @classmethod
    def of(cls, embedding: nn.Embedding, stored: BlockWeight) -> BlockEmbedding:
        """The layer in the place of ``embedding``."""
        layer = cls.__new__(cls)
        _take(layer, embedding, stored, None)
        layer.num_embeddings, layer.embedding_dim = stored.shape
        for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(layer, name, getattr(embedding, name))
        layer.dtype = embedding.weight.dtype
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        stored = block_weight(self)
        assert stored is not None
        return stored.rows_at(input, torch.bfloat16).to(self.dtype)

    def plain_weight(self) -> Tensor:
        """W (tokens, dim) in bf16, de-quantized."""
        return _plain(self)

    def extra_repr(self) -> str:
        """The base layer's line with the format."""
        return f"{super().extra_repr()}, blocks={self.block_format}"


def in_nf4(linear: nn.Linear) -> BlockLinear:
    """The layer with ``linear``'s weight rounded to NF4, and its own bias."""
    layer = BlockLinear.of(linear, quantize_nf4(linear.weight.detach()))
    note_base(layer.weight, linear.weight)  # it is the base model's, whatever it was rounded to
    return layer


def can_be_nf4(linear: nn.Linear) -> bool:
    """Whether a layer's rows divide into NF4's blocks."""
    return linear.weight.shape[-1] % NF4_BLOCK == 0


def _take(layer: nn.Module, of: nn.Module, stored: BlockWeight, parameter: nn.Parameter | None) -> None:
    """Give a new layer the blocks of a weight, and what belongs to them."""
    nn.Module.__init__(layer)
    layer.weight = nn.Parameter(stored.data, requires_grad=False) if parameter is None else parameter
    vars(layer).update(block_format=stored.format, block_columns=stored.columns)
    for name, tensor in zip(("absmax", "group_scale", "offset"), stored.tensors[1:], strict=True):
        if tensor is not None:
            layer.register_buffer(f"weight_{name}", tensor, persistent=False)
    layer.training = of.training


def _plain(layer: nn.Module) -> Tensor:
    stored = block_weight(layer)
    assert stored is not None
    return stored.dequantized(torch.bfloat16)
