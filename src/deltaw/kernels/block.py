"""A decoder's block in one call forward and one backward, where the compiled kernels serve all of it.

    x₁ = x  + output(attention(rotate(queries, keys), values))     all of norm(x)
    y  = x₁ + down(f(gate) · up)                                    both of norm(x₁)

The same can be composed of the single kernels, and comes out the same to the bit; but where rows are short,
some thirty calls a block and direction take as long as what they compute. All that the backward wants beside
the input lies in one tensor.

Knows tensors and addresses; not modules, and not who may look on: the caller asks
:func:`deltaw.kernels.operators.unwatched`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.linear import can_multiply
from deltaw.kernels.rows import ACTIVATIONS
from deltaw.kernels.structs import BlockParts, Layer, RowNorm


class LinearTensors(Protocol):
    """A frozen layer and its update, as :func:`deltaw.kernels.linear.linear` takes them."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    columns: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float


class NormTensors(Protocol):
    """A norm of rows, as :func:`deltaw.kernels.rows.norm` takes it."""

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def eps(self) -> float: ...
    @property
    def offset(self) -> float: ...
    @property
    def centred(self) -> bool: ...


_P, _L = ctypes.c_void_p, ctypes.c_int64


class Block:
    """The tensors of a block, by address; to be made anew when one of them is another, or lies elsewhere.

    Args:
        layers: queries', keys', values', output's, gate's, up's and down's.
        norms: before attention and before the gated half.
        activation: of gates; a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
        scaling, window, softcap: what attention is told.
        turned: numbers of a head that rotary positions turn; 0 without them.
    """

    def __init__(
        self,
        layers: Sequence[LinearTensors],
        norms: Sequence[NormTensors],
        *,
        dtype: torch.dtype,
        head_size: int,
        activation: str,
        scaling: float,
        window: int | None,
        softcap: float | None,
        turned: int,
    ) -> None:
        weights = [(norm.weight, norm.bias) for norm in norms]
        self._alive = (list(layers), weights)
        self._factors = [(layer.lora_A, layer.lora_B) for layer in layers]
        outputs = [layer.weight.shape[0] for layer in layers]
        self._parts = BlockParts(
            loader.number(dtype),
            outputs[0] // head_size,
            outputs[1] // head_size,
            head_size,
            ACTIVATIONS.index(activation),
            window or 0,
            turned,
            scaling,
            softcap or 0.0,
            *(
                RowNorm(*map(loader.address, pair), norm.eps, norm.offset, norm.centred)
                for norm, pair in zip(norms, weights, strict=True)
            ),
            *map(_layer, layers),
        )
        self._at = ctypes.addressof(self._parts)
        self._sizes = (_L * 3)()
        self._sizes_of = -1

    def forward(
        self, x: Tensor, segments: Tensor, cosine: Tensor | None, sine: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, like x (…, T, hidden), and what :meth:`backward` wants.

        Args:
            segments: (4, S), see :meth:`deltaw.kernels.layout.Layout.segments`.
            cosine, sine: (T, turned) in fp32.
        """
        length = x.shape[-2]
        kept_bytes, scratch_bytes, _ = self._room(length)
        saved, scratch = (torch.empty(n, dtype=torch.uint8) for n in (kept_bytes, scratch_bytes))
        y = torch.empty_like(x)
        loader.kernels().dw_block(
            self._at, length, x.data_ptr(), segments.data_ptr(), segments.shape[1], loader.address(cosine),
            loader.address(sine), saved.data_ptr(), scratch.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y, saved

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        saved: Tensor,
        segments: Tensor,
        cosine: Tensor | None,
        sine: Tensor | None,
        need_x: bool,
        need_factors: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """∂L/∂x where it is needed, and ∂L/∂A and ∂L/∂B of each layer that has them, in fp32."""
        length = x.shape[-2]
        scratch = torch.empty(self._room(length)[2], dtype=torch.uint8)
        dx = torch.empty_like(x) if need_x else None
        factors: list[Tensor] = []
        addresses: list[int | None] = []
        for pair in self._factors:
            for factor in pair:
                if factor is None or not need_factors:
                    addresses.append(None)
                    continue
                factors.append(torch.empty(factor.shape))
                addresses.append(factors[-1].data_ptr())
        loader.kernels().dw_block_backward(
            self._at, length, x.data_ptr(), segments.data_ptr(), segments.shape[1], loader.address(cosine),
            loader.address(sine), saved.data_ptr(), scratch.data_ptr(), grad.data_ptr(), loader.address(dx),
            (_P * len(addresses))(*addresses),
        )  # fmt: skip
        return dx, factors

    def _room(self, length: int) -> tuple[int, int, int]:
        """Bytes kept, and of scratch forward and backward, for so many tokens."""
        if length != self._sizes_of:
            loader.kernels().dw_block_sizes(self._at, length, self._sizes)
            self._sizes_of = length
        return tuple(self._sizes)  # type: ignore[return-value]


def serves(x: Tensor, layers: Sequence[LinearTensors], norms: Sequence[NormTensors], head_size: int) -> bool:
    """Whether the kernels take all of a block for rows like x (…, T, hidden)."""
    if not loader.serves(x, *(t for norm in norms for t in (norm.weight, norm.bias))):
        return False
    for layer in layers:
        probe = x.new_empty(0, layer.weight.shape[1])
        if not can_multiply(probe, layer.weight, layer.lora_A, True, layer.scale is not None):
            return False
        tensors = (layer.bias, layer.scale, layer.columns, layer.lora_A, layer.lora_B)
        if any(t is not None and not t.is_contiguous() for t in tensors):
            return False
        if layer.bias is not None and layer.bias.dtype not in (torch.float32, x.dtype):
            return False
    sizes = [layer.weight.shape[0] for layer in layers]
    return head_size % 2 == 0 and sizes[1] == sizes[2] and not any(n % head_size for n in sizes[:3])


def _layer(of: LinearTensors) -> Layer:
    outputs, inputs = of.weight.shape
    return Layer(
        *map(loader.address, (of.weight, of.scale, of.columns, of.bias, of.lora_A, of.lora_B)),
        inputs,
        outputs,
        0 if of.lora_A is None else of.lora_A.shape[1],
        loader.number(of.weight.dtype),
        of.bias is not None and of.bias.dtype == torch.float32,
        of.scaling,
    )
