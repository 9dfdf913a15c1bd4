"""A decoding step in plain torch: the reference implementation, and what runs without the compiled kernels.

    x₁ = x + output(attention(rotate(queries, keys), values)),    y = x₁ + down(f(gate) · up)

over a packed batch of tokens of several sequences, whose keys and values lie in pages. Norms, splits and
parallel halves are those of ``runtime/fused.py``. Between layers numbers are fp32 (or another type
that is asked for);
a layer's input is rounded as its weight is: to bf16, or to
int8 with a scale for each row.

Knows the parts of a decoder and the layout of pages; not who asks, nor how pages are given out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltaw.kernels import linear as products
from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.bounds import check_vector
from deltaw.kernels.quantize import LONGEST_SUM, quantized_reference
from deltaw.kernels.rows import ACTIVATIONS, HalfNorms, Norm, activation_reference, rotate_reference

# What a decoder is made of: linear layers, norms and blocks as tensors and plain values.
#
# The parts are those of csrc/block.h, with weights as (out, in) alone. Knows tensors; not modules, caches or
# how a step is computed.


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
class DecoderBlock:
    """A transformer's block.

    Args:
        heads, key_heads, head_size: of attention; query heads i·g … i·g + g - 1 share key head i.
        query, key, value: their layers; ``query`` alone where one layer gives all.
        output: attention's last layer.
        gate, up, down: the MLP's layers; without ``up`` and ``gated`` the gate's layer gives gates and then
            ups; not ``gated``, it is the one inner layer.
        first, second: the norms of attention's half and of the MLP's.
        split: how one layer's outputs hold queries, keys and values; see :data:`deltaw.runtime.recognition.Split`.
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
    first: HalfNorms = field(default_factory=HalfNorms)
    second: HalfNorms = field(default_factory=HalfNorms)
    query_norm: Norm | None = None
    key_norm: Norm | None = None
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
            raise ValueError(f"{self.heads} heads of {self.head_size} numbers over {self.key_heads} key heads")
        if self.turned % 2 or not 0 <= self.turned <= self.head_size:
            raise ValueError(f"{self.turned} numbers of a head of {self.head_size} cannot be turned")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"there is no activation '{self.activation}'")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} positions")
        if self.parallel and (self.first.after or self.first.post or self.second.after or self.second.post):
            raise ValueError("a parallel block has no norms behind its halves")
        self._check_layers()
        for half in (self.first, self.second):
            for norm in (half.before, half.after, half.post):
                check_norm(norm, self.hidden)
        for norm in (self.query_norm, self.key_norm):
            check_norm(norm, self.head_size)

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
            "gate": (self.hidden, 2 * inner if self.gated and self.up is None else inner),
            "up": (self.hidden, inner),
            "down": (inner, self.hidden),
        }
        for name, layer in self.layers():
            if (layer.inputs, layer.outputs) != expected[name]:
                raise ValueError(f"{name} is {(layer.inputs, layer.outputs)}, not {expected[name]}")

    @property
    def hidden(self) -> int:
        return self.query.inputs

    def layers(self) -> Iterator[tuple[str, DecoderLinear]]:
        """The layers that there are, with their names."""
        for name in LAYERS:
            if (layer := getattr(self, name)) is not None:
                yield name, layer


def check_norm(norm: Norm | None, size: int) -> None:
    """Raise a ValueError if this is no norm over ``size`` numbers; None is nothing to check."""
    if norm is not None:
        check_vector("a norm's weight", norm.weight, size)
        check_vector("a norm's bias", norm.bias, size)


# A (r, in), and B (r, out) in panels with its scaling multiplied in.
Pair = tuple[Tensor, Tensor]
Factors = Mapping[tuple[int, str], Pair]
FACTOR_PANEL = 16  # outputs of a panel of B; the kernel's own number


@dataclass
class Tokens:
    """The rows of a step.

    Args:
        positions, sequence, adapter: (n). page_table: (s, most).
        factors: of each adapter.
    """

    positions: Tensor
    sequence: Tensor
    page_table: Tensor
    adapter: Tensor
    factors: Sequence[Factors]
    page_tokens: int
    groups: list[tuple[Tensor, Factors]] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = [
            (rows, factors)
            for number, factors in enumerate(self.factors)
            if len(rows := (self.adapter == number).nonzero()[:, 0])
        ]

    def of(self, rows: Tensor) -> Tokens:
        """Some of the rows alone."""
        of_rows = (self.positions[rows], self.sequence[rows], self.page_table, self.adapter[rows])
        return Tokens(*of_rows, self.factors, self.page_tokens)


def in_panels(B: Tensor) -> Tensor:
    """B (r, out) in panels of 16 outputs, filled up with zeros: what some outputs need lies together.

    Returns:
        (⌈out / 16⌉, r, 16) in fp32; in bf16 (⌈out / 16⌉, ⌈r / 2⌉, 16, 2), two rows interleaved.
    """
    pairs = 1 if B.dtype == torch.float32 else 2
    filled = torch.nn.functional.pad(B, (0, -B.shape[1] % FACTOR_PANEL, 0, -B.shape[0] % pairs))
    panels = filled.unflatten(1, (-1, FACTOR_PANEL)).transpose(0, 1)
    if pairs == 2:
        panels = panels.unflatten(1, (-1, 2)).transpose(2, 3)
    return panels.contiguous()


def _of_panels(panels: Tensor, rank: int, outputs: int) -> Tensor:
    """B (r, out) again."""
    if panels.dim() == 4:
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(0, 1).flatten(1)[:rank, :outputs]


def numbers_of_head(size: int, dtype: torch.dtype) -> int:
    """Numbers of a page that keys and values of one token and key head take: the kernels read those of a
    bf16 key in pairs."""
    return 2 * size + (size % 2 if dtype == torch.bfloat16 else 0)


def cached(data: Tensor, block: DecoderBlock, offset: int, page_tokens: int) -> tuple[Tensor, Tensor]:
    """Views of one block's keys (pages, key heads, d, tokens) and values (pages, key heads, tokens, d), in
    this implementation's own order.

    Args:
        data: (pages, numbers of a page). offset: where in a page the block's numbers begin.
    """
    size, heads = block.head_size, block.key_heads
    own = data[:, offset : offset + 2 * heads * size * page_tokens]
    own = own.view(len(data), heads, 2, size * page_tokens)
    return own[:, :, 0].unflatten(2, (size, page_tokens)), own[:, :, 1].unflatten(2, (page_tokens, size))


def block_reference(
    x: Tensor, number: int, block: DecoderBlock, table: Pair | None, cache: Pair, tokens: Tokens
) -> Tensor:
    """One block over rows x (n, D); its keys and values are written to the cache."""
    n = _norm(x, block.first.before)
    q, k, v = _queries_keys_values(n, number, block, tokens)
    q, k = _over_heads(q, block.query_norm), _over_heads(k, block.key_norm)
    if block.turned and table is not None:
        turns = [t[tokens.positions.long()].to(x.dtype) for t in table]
        q, k = (rotate_reference(t, *turns).to(x.dtype) for t in (q, k))
    mixed = _attention(q, k, v, block, cache, tokens).flatten(1)
    y = linear_reference(mixed, block.output, tokens, (number, "output"))
    summed = _ended(y, x, block.first)
    n = _norm(x if block.parallel else summed, block.second.before)
    gate = linear_reference(n, block.gate, tokens, (number, "gate"))
    up = None
    if block.up is not None:
        up = linear_reference(n, block.up, tokens, (number, "up"))
    elif block.gated:
        gate, up = gate.chunk(2, 1)
    inner = activation_reference(gate, up, block.activation)
    return _ended(linear_reference(inner, block.down, tokens, (number, "down")), summed, block.second)


def linear_reference(x: Tensor, layer: DecoderLinear, tokens: Tokens, place: tuple[int, str]) -> Tensor:
    """A layer with the updates of the adapters of each row; x (n, in) to (n, out)."""
    dtype = x.dtype
    narrow = x if layer.factors_dtype == torch.float32 else x.to(torch.bfloat16).to(dtype)
    if isinstance(layer.weight, BlockWeight):
        y, _ = products.linear_reference(narrow, products.Product.of_blocks(layer.weight))
    elif layer.scale is not None:
        rounded, by = quantized_reference(x, layer.columns)
        sums = (rounded.to(dtype) - 128) @ layer.weight.to(dtype).t()
        y = sums * by[:, None].to(dtype) * layer.scale.to(dtype)
    else:
        y = narrow @ layer.weight.to(dtype).t()
    if layer.bias is not None:
        y = y + layer.bias.to(dtype)
    for rows, factors in tokens.groups:
        if place in factors:
            A, panels = (factor.to(dtype) for factor in factors[place])
            B = _of_panels(panels, len(A), layer.outputs)
            y = y.index_add(0, rows, (narrow[rows] @ A.t()) @ B)
    return y


def end_reference(x: Tensor, norm: Norm | None, head: DecoderLinear, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Rows (k, D) after the final norm, and their logits (k, V)."""
    hidden = _norm(x, norm)
    return hidden, linear_reference(hidden, head, tokens, (-1, HEAD))


def _queries_keys_values(n: Tensor, number: int, block: DecoderBlock, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    heads, key_heads, size = block.heads, block.key_heads, block.head_size
    y = linear_reference(n, block.query, tokens, (number, "query"))
    if block.key is not None and block.value is not None:
        k = linear_reference(n, block.key, tokens, (number, "key"))
        v = linear_reference(n, block.value, tokens, (number, "value"))
        return tuple(t.unflatten(1, (-1, size)) for t in (y, k, v))  # type: ignore[return-value]
    if block.split == "stacked":
        return y.unflatten(1, (-1, size)).split([heads, key_heads, key_heads], 1)  # type: ignore[return-value]
    group = heads // key_heads
    of_key_head = y.view(len(y), key_heads, group + 2, size)
    return of_key_head[:, :, :group].flatten(1, 2), of_key_head[:, :, group], of_key_head[:, :, group + 1]


def _attention(q: Tensor, k: Tensor, v: Tensor, block: DecoderBlock, cache: Pair, tokens: Tokens) -> Tensor:
    """What each row (n, heads, d) takes of the values of its sequence up to itself."""
    keys, values = cache
    pages = tokens.page_table.long()
    positions, sequence = tokens.positions.long(), tokens.sequence.long()
    page, slot = pages[sequence, positions // tokens.page_tokens], positions % tokens.page_tokens
    keys[page, :, :, slot] = k.to(keys.dtype)
    values[page, :, slot] = v.to(values.dtype)
    out = torch.empty_like(q)
    group = block.heads // block.key_heads
    for number in sequence.unique().tolist():
        rows = (sequence == number).nonzero()[:, 0]
        at = positions[rows]
        first, last = 0, int(at.max()) + 1
        if block.window is not None:
            first = max(0, int(at.min()) - block.window + 1) // tokens.page_tokens
        own = pages[number, first : -(-last // tokens.page_tokens)]
        seen = torch.arange(first * tokens.page_tokens, last, device=q.device)
        key = keys[own].permute(1, 2, 0, 3).flatten(2)[..., : len(seen)].to(q.dtype)
        value = values[own].transpose(0, 1).flatten(1, 2)[:, : len(seen)].to(q.dtype)
        query = q[rows].unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # (key heads, group, rows, d)
        scores = block.scaling * (query @ key[:, None])
        if block.softcap is not None:
            scores = block.softcap * torch.tanh(scores / block.softcap)
        visible = seen <= at[:, None]
        if block.window is not None:
            visible &= at[:, None] - seen < block.window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        value = value.masked_fill(~visible.any(0)[:, None], 0.0)  # what nobody sees may be no number
        out[rows] = (weights @ value[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm.reference(x)


def _over_heads(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else _norm(x.reshape(-1, x.shape[-1]), norm).view(x.shape)


def _ended(y: Tensor, stream: Tensor, norms: HalfNorms) -> Tensor:
    """The sum of a half with the residual stream."""
    return _norm(stream + _norm(y, norms.after), norms.post)
