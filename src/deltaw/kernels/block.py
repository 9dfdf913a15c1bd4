"""A transformer's block in one call forward and one backward, where the compiled kernels serve all of it.

    x₁ = x  + output(attention(rotate(queries, keys), values))    all of norm(x)
    y  = x₁ + down(f(gate) · up), or down(f(gate))                 of norm(x₁); in parallel blocks of norm(x)

with norms of queries and keys over each head, after a half's last layer or over the sum where the block has
them. The same can be composed of the single kernels, and comes out the same to the bit; but where rows are
short, some thirty calls a block and direction take as long as what they compute. All that the backward wants
beside the input lies in one tensor.

Knows tensors and addresses; not modules, and not who may look on: the caller asks
:func:`deltaw.kernels.operators.unwatched`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.bounds import check_places
from deltaw.kernels.linear import Product, can_multiply
from deltaw.kernels.rows import ACTIVATIONS, HalfNorms, Norm, described
from deltaw.kernels.structs import BlockData, BlockParts, Layer

APART, STACKED, GROUPED = range(3)  # see csrc/block.h


class LinearTensors(Protocol):
    """A frozen layer and its update."""

    @property
    def product(self) -> Product: ...


class AttentionTensors(Protocol):
    """The first half.

    Attributes:
        inputs: queries', keys' and values' layers, or one that gives all: ``grouped`` by key head, or
            stacked.
        how: what attention is told: scaling, window, softcap, causal; see
            :func:`deltaw.kernels.attention.attend`.
    """

    norms: HalfNorms
    heads: int
    key_heads: int
    head_size: int
    grouped: bool
    query_norm: Norm | None
    key_norm: Norm | None
    how: dict[str, Any]

    @property
    def inputs(self) -> Sequence[LinearTensors]: ...
    @property
    def output(self) -> LinearTensors: ...


class MLPTensors(Protocol):
    """The second half.

    Attributes:
        inputs: gate's and up's layers; or one, which gives both where ``gated``.
        kind: of the activation, a name of :data:`deltaw.kernels.rows.ACTIVATIONS`.
    """

    norms: HalfNorms
    gated: bool
    kind: str

    @property
    def inputs(self) -> Sequence[LinearTensors]: ...
    @property
    def output(self) -> LinearTensors: ...


_P, _L = ctypes.c_void_p, ctypes.c_int64


class Block:
    """The tensors of a block, by address; to be made anew when one of them is another, or lies elsewhere.

    Args:
        attention, mlp: the halves.
        parallel: whether both read the block's input.
        turned: numbers of a head that rotary positions turn; 0 without them.
    """

    def __init__(
        self, attention: AttentionTensors, mlp: MLPTensors, *, dtype: torch.dtype, parallel: bool, turned: int
    ) -> None:
        self._made_of = attention, mlp, dtype, parallel, turned
        self._places = _places(attention, mlp)
        layers = _layers(attention, mlp)
        norms = _norms(attention, mlp)
        # What the parts point to, and the structs of weights in blocks.
        self._alive = (
            layers,
            blocks := [None if of is None else of.described() for of in layers],
            [(norm.weight, norm.bias) for norm in norms if norm is not None],
        )
        self._factors = [f for of in layers for f in ((None, None) if of is None else (of.lora_A, of.lora_B))]
        split = APART if len(attention.inputs) == 3 else GROUPED if attention.grouped else STACKED
        how = attention.how
        self._parts = BlockParts(
            *(loader.number(dtype), attention.heads, attention.key_heads, attention.head_size),
            *(ACTIVATIONS.index(mlp.kind), how.get("window") or 0, turned, how.get("causal", True)),
            *(split, mlp.gated, parallel, False, how["scaling"], how.get("softcap") or 0.0),
            *(attention.norms.described(), mlp.norms.described()),
            *map(described, (attention.query_norm, attention.key_norm)),
            *(Layer() if of is None else _layer(of, at) for of, at in zip(layers, blocks, strict=True)),
        )
        self._at = ctypes.addressof(self._parts)
        self._sizes = (_L * 3)()
        self._sizes_of = (-1, -1, False)

    def settled(self) -> Block:
        """This block, or one made anew where its tensors lie elsewhere by now, as weights do that were let go
        of after a forward and gathered again for the backward."""
        attention, mlp, dtype, parallel, turned = self._made_of
        if _places(attention, mlp) == self._places:
            return self
        return Block(attention, mlp, dtype=dtype, parallel=parallel, turned=turned)

    def forward(
        self, x: Tensor, segments: Tensor, cosine: Tensor | None, sine: Tensor | None, picked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """y (T or P, hidden) of x (T, hidden), and what :meth:`backward` wants.

        Args:
            segments: (4, S), see :meth:`deltaw.kernels.layout.Layout.segments`.
            cosine, sine: (T, turned) in fp32.
            picked: (P), ascending, P ≥ 1: the rows whose outputs are asked for; None for all.

        Raises:
            ValueError: the picked places do not ascend. IndexError: one lies outside of the rows.
        """
        length, picks = len(x), 0 if picked is None else len(picked)
        if picked is not None:
            check_places(picked, length)
        kept_bytes, scratch_bytes, _ = self._room(length, picks)
        saved, scratch = (torch.empty(n, dtype=torch.uint8) for n in (kept_bytes, scratch_bytes))
        y = x.new_empty(picks or length, x.shape[1])
        loader.kernels().dw_block(
            self._at, length, x.data_ptr(), segments.data_ptr(), segments.shape[1], loader.address(picked),
            picks, loader.address(cosine), loader.address(sine), saved.data_ptr(), scratch.data_ptr(),
            y.data_ptr(),
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
        picked: Tensor | None,
        need_x: bool,
        need_factors: bool,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """∂L/∂x where it is needed, and ∂L/∂A and ∂L/∂B of each layer that has them, in fp32."""
        length, picks = len(x), 0 if picked is None else len(picked)
        scratch = torch.empty(self._room(length, picks)[2], dtype=torch.uint8)
        dx = torch.empty_like(x) if need_x else None
        made = [torch.empty(f.shape) if need_factors and f is not None else None for f in self._factors]
        loader.kernels().dw_block_backward(
            self._at, length, x.data_ptr(), segments.data_ptr(), segments.shape[1], loader.address(picked),
            picks, loader.address(cosine), loader.address(sine), saved.data_ptr(), scratch.data_ptr(),
            grad.data_ptr(), loader.address(dx), (_P * len(made))(*map(loader.address, made)),
        )  # fmt: skip
        return dx, [factor for factor in made if factor is not None]

    def _room(self, length: int, picks: int) -> tuple[int, int, int]:
        """Bytes kept, and of scratch forward and backward, for so many tokens."""
        rounds = loader.arithmetic().int8_gradients
        if (length, picks, rounds) != self._sizes_of:
            self._parts.int8_gradients = rounds
            loader.kernels().dw_block_sizes(self._at, length, picks, self._sizes)
            self._sizes_of = length, picks, rounds
        return tuple(self._sizes)  # type: ignore[return-value]


def serves(x: Tensor, attention: AttentionTensors, mlp: MLPTensors, parallel: bool) -> bool:
    """Whether the kernels take all of a block for rows like x (T, hidden)."""
    norms = [norm for norm in _norms(attention, mlp) if norm is not None]
    if not loader.serves(x, *(t for norm in norms for t in (norm.weight, norm.bias))):
        return False
    if any(t is not None and not t.is_contiguous() for norm in norms for t in (norm.weight, norm.bias)):
        return False
    if not all(_serves_layer(x, layer) for layer in _layers(attention, mlp) if layer is not None):
        return False
    ends = [half.norms.after or half.norms.post for half in (attention, mlp)]
    return not (parallel and any(ends)) and _fit(attention, mlp)


def _serves_layer(x: Tensor, of: Product) -> bool:
    if not can_multiply(x.new_empty(0, of.sizes[0]), of):
        return False
    tensors = (of.bias, of.scale, of.smooth_scales, of.lora_A, of.lora_B)
    if any(t is not None and not t.is_contiguous() for t in tensors):
        return False
    return of.bias is None or of.bias.dtype in (torch.float32, x.dtype)


def _fit(attention: AttentionTensors, mlp: MLPTensors) -> bool:
    """Whether the layers' outputs are what the halves take them for, and heads of an even size."""
    size, heads, key_heads = attention.head_size, attention.heads, attention.key_heads
    if size % 2 or not key_heads or heads % key_heads:
        return False
    each = [heads * size, key_heads * size, key_heads * size]
    expected = each if len(attention.inputs) == 3 else [sum(each)]
    if [layer.product.sizes[1] for layer in attention.inputs] != expected:
        return False
    inner = mlp.output.product.sizes[0]
    wide = [inner] * len(mlp.inputs) if len(mlp.inputs) == 1 + mlp.gated else [2 * inner]
    return [layer.product.sizes[1] for layer in mlp.inputs] == wide and mlp.kind in ACTIVATIONS


def _layers(attention: AttentionTensors, mlp: MLPTensors) -> list[Product | None]:
    """In the kernels' order: queries', keys', values', output's, gate's, up's and down's, or None."""
    found: list[Product | None] = []
    for half, inputs in ((attention, 3), (mlp, 2)):
        found += [layer.product for layer in half.inputs]
        found += [*[None] * (inputs - len(half.inputs)), half.output.product]
    return found


def _norms(attention: AttentionTensors, mlp: MLPTensors) -> list[Norm | None]:
    """Before, after and post of each half, then those of queries and keys."""
    halves = [norm for of in (attention.norms, mlp.norms) for norm in (of.before, of.after, of.post)]
    return [*halves, attention.query_norm, attention.key_norm]


def _places(attention: AttentionTensors, mlp: MLPTensors) -> list[int]:
    """Where the frozen tensors of a block lie."""
    tensors = [t for of in _layers(attention, mlp) if of is not None for t in (of.weight, of.bias)]
    tensors += [t for of in _norms(attention, mlp) if of is not None for t in (of.weight, of.bias)]
    return [t.data_ptr() for t in tensors if t is not None]


def _layer(of: Product, described: BlockData | None) -> Layer:
    return Layer(
        of.address(described),
        *map(loader.address, (of.scale, of.smooth_scales, of.bias, of.lora_A, of.lora_B)),
        *of.sizes,
        *(0 if of.lora_A is None else of.lora_A.shape[1], of.number, of.by_column),
        *(of.bias is not None and of.bias.dtype == torch.float32, of.in_blocks, of.scaling),
    )
