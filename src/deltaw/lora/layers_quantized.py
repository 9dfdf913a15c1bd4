"""Frozen layers with a quantized weight: int8 with a scale per row, or blocks of few bits.

**int8:** W ≈ (Q · scale) ∘ columns,        y = (x ∘ columns)·(Q · scale)ᵀ + b

Both products of a training step, with Wᵀ and with W, read the same int8 weight Q. Inputs are quantized dynamically with
a scale per token, or with ``in_blocks`` per 128 values. ``columns`` are SmoothQuant scales (arXiv 2211.10438, eq. 3),
one per input. The weight of transformers' ``Conv1D`` is (in, out) and is stored transposed.

**Blocks** (``kernels/block_linear.py``): the parameter ``weight`` contains the bytes of the blocks, uint8 (rows, bytes
of a row), so that state dict, size and device are consistent. A linear layer multiplies with the blocks directly. An
embedding dequantizes the rows of the given tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.kernels import quantize
from deltaw.kernels.block_linear import NF4_BLOCK, BlockWeight, quantize_nf4
from deltaw.kernels.torch_modules import direct_parameters
from deltaw.lora.fingerprint import record_base_digest
from deltaw.lora.stored import BLOCK_BUFFERS, Scales, block_weight, frozen_linear


class _Int8(nn.Module):
    """Base class of int8-quantized layers."""

    weight: Tensor
    bias: nn.Parameter
    weight_scale: Tensor
    weight_columns: Tensor | None
    in_blocks: bool

    def _init_quantized(self, of: nn.Module, weight: Tensor, columns: Tensor | None, in_blocks: bool) -> None:
        """Initialize from the weight (out, in) to quantize and the bias of the layer ``of``."""
        nn.Module.__init__(self)
        with torch.no_grad():
            steps, scale = quantize.quantize_rows(weight if columns is None else weight.float() / columns)
        self.weight = nn.Parameter(steps.contiguous(), requires_grad=False)
        record_base_digest(self.weight, of.get_parameter("weight"))
        bias = direct_parameters(of).get("bias")
        self.register_parameter("bias", bias)
        if bias is not None:
            bias.requires_grad_(False)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_columns", columns)
        vars(self)["in_blocks"] = in_blocks or weight.shape[1] > quantize.MAX_SUM_LENGTH
        self.training = of.training

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        scales = Scales(self.weight_scale, self.weight_columns, self.in_blocks)
        return frozen_linear(input, self.weight, self.bias, scales)

    def plain_weight(self) -> Tensor:
        """Return the dequantized weight in fp32, in the layout of the original layer."""
        wide = self.weight.float() * self.weight_scale[:, None]
        return wide if self.weight_columns is None else wide * self.weight_columns


class Int8Linear(_Int8, nn.Linear):
    """y = x·Wᵀ + b with W (out, in) in int8, frozen."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, columns: Tensor | None = None, in_blocks: bool = False) -> Int8Linear:
        """Create the layer with the weight of ``linear`` quantized to int8, and its bias.

        Args:
            linear: Layer to quantize.
            columns: (in) fp32 factors of the inputs before rounding, or None.
            in_blocks: Quantize inputs with a scale per 128 values instead of per token. Always used for inputs that are
                too long to sum in int32.
        """
        layer = cls.__new__(cls)
        layer._init_quantized(linear, linear.weight, columns, in_blocks)
        layer.in_features = linear.in_features
        layer.out_features = linear.out_features
        return layer


class Int8Conv1D(_Int8):
    """Replacement of transformers' ``Conv1D``: y = x·W + b with Wᵀ (out, in) in int8, frozen."""

    nf: int
    nx: int

    @classmethod
    def from_conv1d(cls, module: nn.Module, columns: Tensor | None = None, in_blocks: bool = False) -> Int8Conv1D:
        """Create the layer with the weight of ``module`` transposed and quantized to int8, and its bias.

        Args:
            module: Layer to quantize.
            columns, in_blocks: See :meth:`Int8Linear.from_linear`.
        """
        layer = cls.__new__(cls)
        layer._init_quantized(module, module.get_parameter("weight").t(), columns, in_blocks)
        layer.nf, layer.nx = layer.weight.shape  # Conv1D's names of the numbers of outputs and inputs
        return layer

    def plain_weight(self) -> Tensor:
        """Return W (in, out) in fp32, dequantized."""
        return super().plain_weight().t()

    def extra_repr(self) -> str:
        """Return the sizes in the format of ``Conv1D``."""
        return f"nf={self.nf}, nx={self.nx}"


class _Blocks(nn.Module):
    """Base class of layers with a weight in blocks."""

    weight: Tensor
    block_format: str
    block_columns: int

    def _init_from_blocks(self, of: nn.Module, stored: BlockWeight, parameter: nn.Parameter | None = None) -> None:
        """Initialize from a weight in blocks."""
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
        """Return W (rows, columns) in bf16, dequantized."""
        return self.stored.dequantized(torch.bfloat16)

    def extra_repr(self) -> str:
        """Return the base layer's description with the block format."""
        return f"{super().extra_repr()}, blocks={self.block_format}"


class BlockLinear(_Blocks, nn.Linear):
    """y = x·Wᵀ + b with W (out, in) in blocks, frozen."""

    @classmethod
    def of(cls, linear: nn.Linear, stored: BlockWeight, parameter: nn.Parameter | None = None) -> BlockLinear:
        """Create the replacement of ``linear`` with its bias.

        Args:
            linear: Layer to replace.
            stored: Weight in blocks.
            parameter: Parameter of another layer with the blocks' bytes, if the weights are tied.
        """
        layer = cls.__new__(cls)
        layer._init_from_blocks(linear, stored, parameter)
        layer.out_features, layer.in_features = stored.shape
        layer.register_parameter("bias", direct_parameters(linear).get("bias"))
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return frozen_linear(input, self.weight, self.bias, self.stored)


class BlockEmbedding(_Blocks, nn.Embedding):
    """y = W[ids] with W (tokens, dim) in blocks, frozen.

    Attributes:
        dtype: Dtype of the returned rows.
    """

    dtype: torch.dtype

    @classmethod
    def of(cls, embedding: nn.Embedding, stored: BlockWeight) -> BlockEmbedding:
        """Create the replacement of ``embedding``."""
        layer = cls.__new__(cls)
        layer._init_from_blocks(embedding, stored)
        layer.num_embeddings, layer.embedding_dim = stored.shape
        for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"):
            setattr(layer, name, getattr(embedding, name))
        layer.dtype = embedding.weight.dtype
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """(...) of token ids to (..., embedding_dim)."""
        return self.stored.rows_at(input, torch.bfloat16).to(self.dtype)


def quantize_linear_nf4(linear: nn.Linear) -> BlockLinear:
    """Create the layer with the weight of ``linear`` quantized to NF4, and its bias."""
    layer = BlockLinear.of(linear, quantize_nf4(linear.weight.detach()))
    record_base_digest(layer.weight, linear.weight)  # the fingerprint is that of the base model
    return layer


def supports_nf4(linear: nn.Linear) -> bool:
    """True if the layer's rows are divisible into NF4 blocks."""
    return linear.weight.shape[-1] % NF4_BLOCK == 0
