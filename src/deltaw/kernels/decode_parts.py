"""What a decoder is made of: linear layers, norms and blocks as tensors and plain values.

The parts are those of csrc/block.h, with weights as (out, in) alone. Knows tensors; not modules, caches or
how a step is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltaw.kernels.block_formats import BlockWeight
from deltaw.kernels.bounds import check_shape
from deltaw.kernels.quantize import LONGEST_SUM
from deltaw.kernels.rows import ACTIVATIONS

# The layers of a block by the names of the kernels, and the decoder's head.
LAYERS = ("query", "key", "value", "output", "gate", "up", "down")
HEAD = "head"
Split = Literal["apart", "stacked", "grouped"]


@dataclass(frozen=True, eq=False)
class DecoderLinear:
    """y = x·Wᵀ + bias; of a weight in int8, y = (x ∘ columns)·(Q · scale)ᵀ + bias.

    Args:
        weight: (out, in), contiguous, in fp32, bf16 or int8; or in blocks, which are multiplied as the
            numbers that they stand for, rounded to bf16.
        bias: (out) fp32. scale: (out) fp32, of an int8 weight. columns: (in) fp32, SmoothQuant scales.

    Raises:
        ValueError: the tensors do not fit each other.
    """

    weight: Tensor | BlockWeight
    bias: Tensor | None = None
    scale: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, Tensor):
            if self.weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
                raise ValueError(f"a decoder's weight is fp32, bf16 or int8, not {self.weight.dtype}")
            if self.weight.dim() != 2 or not self.weight.is_contiguous():
                raise ValueError("a decoder's weight is a contiguous matrix (out, in)")
        if not self.weight.shape.numel():
            raise ValueError("a decoder's weight is empty")
        int8 = isinstance(self.weight, Tensor) and self.weight.dtype == torch.int8
        if int8 != (self.scale is not None):
            raise ValueError("an int8 weight has scales, and no other has")
        if int8 and self.inputs > LONGEST_SUM:
            raise ValueError(f"{self.inputs} inputs are too many for sums of int8 products")
        if self.columns is not None and self.scale is None:
            raise ValueError("SmoothQuant scales belong to int8 weights")
        check_vector("the bias", self.bias, self.outputs)
        check_vector("the weight's scales", self.scale, self.outputs)
        check_vector("the SmoothQuant scales", self.columns, self.inputs)

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def factors_dtype(self) -> torch.dtype:
        """The type in which the factors of this layer's update are kept."""
        plain = isinstance(self.weight, Tensor) and self.weight.dtype == torch.float32
        return torch.float32 if plain else torch.bfloat16


@dataclass(frozen=True, eq=False)
class DecoderNorm:
    """(x - mean)·rstd·(weight + offset) + bias; see :class:`deltaw.runtime.roles.NormForm`."""

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5
    offset: float = 0.0
    centered: bool = False

    def check(self, size: int) -> None:
        """Raises ValueError where this is no norm over ``size`` numbers."""
        check_vector("a norm's weight", self.weight, size)
        check_vector("a norm's bias", self.bias, size)


@dataclass(frozen=True, eq=False)
class DecoderNorms:
    """The norms of half a block: before its first layers, after its last one, and over the sum."""

    before: DecoderNorm | None = None
    after: DecoderNorm | None = None
    post: DecoderNorm | None = None

    def all(self) -> tuple[DecoderNorm, ...]:
        return tuple(norm for norm in (self.before, self.after, self.post) if norm is not None)


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """A transformer's block.

    Args:
        heads, key_heads, head_size: of attention; query heads i·g … i·g + g - 1 share key head i.
        query, key, value: their layers; ``query`` alone where one layer gives all.
        output: attention's last layer.
        gate, up, down: the MLP's layers; without ``up`` and ``gated`` the gate's layer gives gates and then
            ups; not ``gated``, it is the one inner layer.
        first, second: the norms of attention's half and of the MLP's.
        split: how one layer's outputs hold queries, keys and values; see :data:`deltaw.runtime.roles.Split`.
        activation: a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
        scaling, window, softcap: see :func:`deltaw.kernels.attention.packed_attention`.
        turned: the numbers of a head that rotary positions turn; 0 without them.
        table: the number of the decoder's rotary table.

    Raises:
        ValueError: the parts do not fit each other.
    """

    heads: int
    key_heads: int
    head_size: int
    query: DecoderLinear
    output: DecoderLinear
    gate: DecoderLinear
    down: DecoderLinear
    key: DecoderLinear | None = None
    value: DecoderLinear | None = None
    up: DecoderLinear | None = None
    first: DecoderNorms = field(default_factory=DecoderNorms)
    second: DecoderNorms = field(default_factory=DecoderNorms)
    query_norm: DecoderNorm | None = None
    key_norm: DecoderNorm | None = None
    split: Split = "apart"
    gated: bool = True
    parallel: bool = False
    activation: str = "silu"
    scaling: float = 1.0
    window: int | None = None
    softcap: float | None = None
    turned: int = 0
    table: int = 0

    def __post_init__(self) -> None:
        if min(self.heads, self.key_heads, self.head_size) < 1 or self.heads % self.key_heads:
            raise ValueError(
                f"{self.heads} heads of {self.head_size} numbers over {self.key_heads} key heads"
            )
        if self.turned % 2 or not 0 <= self.turned <= self.head_size:
            raise ValueError(f"{self.turned} numbers of a head of {self.head_size} cannot be turned")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation '{self.activation}'")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} positions")
        if self.parallel and (self.first.after or self.first.post or self.second.after or self.second.post):
            raise ValueError("a parallel block has no norms behind its halves")
        self._check_layers()
        for norm in (*self.first.all(), *self.second.all()):
            norm.check(self.hidden)
        for head_norm in (self.query_norm, self.key_norm):
            if head_norm is not None:
                head_norm.check(self.head_size)

    def _check_layers(self) -> None:
        apart = self.split == "apart"
        if apart != (self.key is not None) or apart != (self.value is not None):
            raise ValueError("queries, keys and values come of three layers, or of one")
        if self.up is not None and not self.gated:
            raise ValueError("an MLP without a gate has one inner layer")
        wide, narrow = self.heads * self.head_size, self.key_heads * self.head_size
        inner = self.down.inputs
        expected = {
            "query": (self.hidden, wide if apart else wide + 2 * narrow),
            "key": (self.hidden, narrow),
            "value": (self.hidden, narrow),
            "output": (wide, self.hidden),
            "gate": (self.hidden, 2 * inner if self.gate_gives_up else inner),
            "up": (self.hidden, inner),
            "down": (inner, self.hidden),
        }
        for name, layer in self.layers():
            if (layer.inputs, layer.outputs) != expected[name]:
                raise ValueError(f"{name} is {(layer.inputs, layer.outputs)}, not {expected[name]}")

    @property
    def hidden(self) -> int:
        return self.query.inputs

    @property
    def gate_gives_up(self) -> bool:
        return self.gated and self.up is None

    def layers(self) -> Iterator[tuple[str, DecoderLinear]]:
        """The layers that there are, with their names."""
        for name in LAYERS:
            layer = getattr(self, name)
            if layer is not None:
                yield name, layer


def check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    """Refuse what is no contiguous vector of fp32 numbers of this size; None is nothing to check."""
    check_shape(name, tensor, size)
    if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous and in fp32")
