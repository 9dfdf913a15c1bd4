"""Parts of a decoder, and a decoding step in plain torch: the reference implementation and the fallback.

    x₁ = x + output(attention(rotate(queries, keys), values)),    y = x₁ + down(f(gate) · up)

The input is a packed batch of tokens of several sequences, whose keys and values are stored in pages. Norms, splits and
parallel halves are those of ``runtime/fused.py``. Values between layers are fp32 (or the input's type). The input of a
layer is rounded like its weight: to bf16, or to int8 with a scale per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from deltaw.kernels import linear as products
from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.operators import check_vector
from deltaw.kernels.quantize import MAX_SUM_LENGTH, quantize_activations_reference
from deltaw.kernels.rows import ACTIVATIONS, HalfNorms, Norm, activation_reference, rotate_reference

# Names of a block's layers in the kernels' order, and of the decoder's head.
LAYERS = ("query", "key", "value", "output", "gate", "up", "down")
HEAD = "head"
Split = Literal["apart", "stacked", "grouped"]


@dataclass(frozen=True, eq=False)
class DecoderLinear:
    """y = x·Wᵀ + bias, or y = (x ∘ smooth_scales)·(Q · scale)ᵀ + bias for an int8 weight Q.

    Attributes:
        weight: Contiguous (out, in) in fp32, bf16 or int8, or a weight in blocks, which is rounded to bf16.
        bias: (out) fp32 or None.
        scale: (out) fp32 scales of an int8 weight.
        smooth_scales: (in) fp32 SmoothQuant scales or None.

    Raises:
        ValueError: if the tensors do not match.
    """

    weight: Tensor | BlockWeight
    bias: Tensor | None = None
    scale: Tensor | None = None
    smooth_scales: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weight, Tensor):
            if self.weight.dtype not in (torch.float32, torch.bfloat16, torch.int8):
                raise ValueError(f"a decoder's weight must be fp32, bf16 or int8, not {self.weight.dtype}")
            if self.weight.dim() != 2 or not self.weight.is_contiguous():
                raise ValueError("a decoder's weight must be a contiguous matrix (out, in)")
        if not self.weight.shape.numel():
            raise ValueError("a decoder's weight is empty")
        int8 = isinstance(self.weight, Tensor) and self.weight.dtype == torch.int8
        if int8 != (self.scale is not None):
            raise ValueError("int8 weights require scales, and other weights must not have any")
        if int8 and self.inputs > MAX_SUM_LENGTH:
            raise ValueError(f"{self.inputs} inputs are too many for sums of int8 products")
        if self.smooth_scales is not None and self.scale is None:
            raise ValueError("SmoothQuant scales require an int8 weight")
        check_vector("the bias", self.bias, self.outputs)
        check_vector("the weight's scales", self.scale, self.outputs)
        check_vector("the SmoothQuant scales", self.smooth_scales, self.inputs)

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def factors_dtype(self) -> torch.dtype:
        """Type of the packed low-rank factors of this layer."""
        plain = isinstance(self.weight, Tensor) and self.weight.dtype == torch.float32
        return torch.float32 if plain else torch.bfloat16


@dataclass(frozen=True, eq=False)
class DecoderBlock:
    """A transformer block.

    Attributes:
        heads: Number of query heads. Query heads i·g … i·g + g - 1 share key head i.
        key_heads: Number of key heads.
        head_size: Numbers per head.
        query: Layer of queries, or the joint layer of queries, keys and values.
        output: Output layer of attention.
        gate: Gate layer of the MLP. If ``gated`` and ``up`` is None, its outputs are gates, then ups. If not ``gated``,
            it is the only inner layer.
        down: Output layer of the MLP.
        key: Layer of keys, or None.
        value: Layer of values, or None.
        up: Up layer, or None.
        first: Norms of the attention half.
        second: Norms of the MLP half.
        query_norm: Norm of each query head, or None.
        key_norm: Norm of each key head, or None.
        split: Order of queries, keys and values in a joint layer's outputs; see
            :data:`deltaw.runtime.block_roles.Split`.
        gated: True if the MLP has a gate.
        parallel: True if both halves read the block's input.
        activation: Name from :data:`deltaw.kernels.rows.ACTIVATIONS`.
        scaling: See :class:`deltaw.kernels.attention.AttentionOptions`, like the next two.
        window: Sliding-window size or None.
        softcap: Soft cap of the scores or None.
        rotary_dims: Numbers per head that rotary positions rotate, or 0.
        table: Index of the decoder's rotary table.

    Raises:
        ValueError: if the parts do not match.
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
    rotary_dims: int = 0
    table: int = 0

    def __post_init__(self) -> None:
        if min(self.heads, self.key_heads, self.head_size) < 1 or self.heads % self.key_heads:
            raise ValueError(f"{self.heads} heads of {self.head_size} numbers over {self.key_heads} key heads")
        if self.rotary_dims % 2 or not 0 <= self.rotary_dims <= self.head_size:
            raise ValueError(f"rotary_dims must be even and at most {self.head_size}, not {self.rotary_dims}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation '{self.activation}'")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be positive, not {self.window}")
        if self.parallel and (self.first.after or self.first.post or self.second.after or self.second.post):
            raise ValueError("a parallel block cannot have norms after its halves")
        self._check_layers()
        for half in (self.first, self.second):
            for norm in (half.before, half.after, half.post):
                check_norm(norm, self.hidden)
        for norm in (self.query_norm, self.key_norm):
            check_norm(norm, self.head_size)

    def _check_layers(self) -> None:
        is_separate = self.split == "apart"
        if is_separate != (self.key is not None) or is_separate != (self.value is not None):
            raise ValueError("queries, keys and values require three layers, or one joint layer")
        if self.up is not None and not self.gated:
            raise ValueError("an MLP without a gate must have one inner layer")
        query_size = self.heads * self.head_size
        key_size = self.key_heads * self.head_size
        inner = self.down.inputs
        expected = {
            "query": (self.hidden, query_size if is_separate else query_size + 2 * key_size),
            "key": (self.hidden, key_size),
            "value": (self.hidden, key_size),
            "output": (query_size, self.hidden),
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
        """Yield the names and layers of the block, without missing ones."""
        for name in LAYERS:
            if (layer := getattr(self, name)) is not None:
                yield name, layer


@dataclass(frozen=True)
class AttentionForm:
    """Attention of a layer over pages. The attributes are those of :class:`DecoderBlock`."""

    heads: int
    key_heads: int
    head_size: int
    scaling: float
    window: int | None = None
    softcap: float | None = None


def check_norm(norm: Norm | None, size: int) -> None:
    """Check a norm's tensors for ``size`` numbers. None is accepted.

    Raises:
        ValueError: if they do not match.
    """
    if norm is not None:
        check_vector("a norm's weight", norm.weight, size)
        check_vector("a norm's bias", norm.bias, size)


# A (r, in), and B (r, out) in panels and multiplied by the scaling.
FactorPair = tuple[Tensor, Tensor]
Factors = Mapping[tuple[int, str], FactorPair]
FACTOR_PANEL = 16  # outputs per panel of B; the C++ kernels use the same constant


@dataclass
class Tokens:
    """Rows of a step.

    Attributes:
        positions: (n) position of each row in its sequence.
        sequence: (n) index of each row in the page table.
        page_table: (s, p) page numbers.
        adapter: (n) index of each row's adapter, or -1.
        factors: Factors of each adapter.
        page_tokens: Tokens per page.
        groups: Row indices and factors of each adapter that has rows.
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

    def select(self, rows: Tensor) -> Tokens:
        """Return a selection of the rows."""
        selected = (self.positions[rows], self.sequence[rows], self.page_table, self.adapter[rows])
        return Tokens(*selected, self.factors, self.page_tokens)


def pack_panels(B: Tensor) -> Tensor:
    """Pack B (r, out) into zero-padded panels of 16 outputs, so that the numbers of an output are contiguous.

    Returns:
        (⌈out / 16⌉, r, 16) in fp32. In bf16 (⌈out / 16⌉, ⌈r / 2⌉, 16, 2), with two rows interleaved.
    """
    row_pairs = 1 if B.dtype == torch.float32 else 2
    padded = torch.nn.functional.pad(B, (0, -B.shape[1] % FACTOR_PANEL, 0, -B.shape[0] % row_pairs))
    panels = padded.unflatten(1, (-1, FACTOR_PANEL)).transpose(0, 1)
    if row_pairs == 2:
        panels = panels.unflatten(1, (-1, 2)).transpose(2, 3)
    return panels.contiguous()


def _unpack_panels(panels: Tensor, rank: int, outputs: int) -> Tensor:
    """Invert :func:`pack_panels`: return B (r, out)."""
    if panels.dim() == 4:
        panels = panels.transpose(2, 3).flatten(1, 2)
    return panels.transpose(0, 1).flatten(1)[:rank, :outputs]


def cache_numbers_per_token(size: int, dtype: torch.dtype) -> int:
    """Return the numbers in a page for keys and values of one token and key head.

    bf16 keys are padded to an even size because the kernels read them in pairs.
    """
    return 2 * size + (size % 2 if dtype == torch.bfloat16 else 0)


def cache_views(
    data: Tensor, block: DecoderBlock | AttentionForm, offset: int, page_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return views of a block's keys (pages, key heads, d, tokens) and values (pages, key heads, tokens, d).

    Only the reference implementation uses this order.

    Args:
        data: (pages, numbers per page).
        block: Block.
        offset: Offset of the block's numbers in a page.
        page_tokens: Tokens per page.
    """
    size = block.head_size
    heads = block.key_heads
    cache = data[:, offset : offset + 2 * heads * size * page_tokens]
    cache = cache.view(len(data), heads, 2, size * page_tokens)
    return cache[:, :, 0].unflatten(2, (size, page_tokens)), cache[:, :, 1].unflatten(2, (page_tokens, size))


def block_reference(
    x: Tensor, number: int, block: DecoderBlock, table: FactorPair | None, cache: FactorPair, tokens: Tokens
) -> Tensor:
    """Run a block over rows x (n, D), and write keys and values to the cache."""
    n = _norm(x, block.first.before)
    q, k, v = _queries_keys_values(n, number, block, tokens)
    q = _over_heads(q, block.query_norm)
    k = _over_heads(k, block.key_norm)
    if block.rotary_dims and table is not None:
        angles = [t[tokens.positions.long()].to(x.dtype) for t in table]
        q, k = (rotate_reference(t, *angles).to(x.dtype) for t in (q, k))
    attended = attention_reference(q, k, v, block, cache, tokens).flatten(1)
    y = linear_reference(attended, block.output, tokens, (number, "output"))
    summed = _add_residual(y, x, block.first)
    n = _norm(x if block.parallel else summed, block.second.before)
    gate = linear_reference(n, block.gate, tokens, (number, "gate"))
    up = None
    if block.up is not None:
        up = linear_reference(n, block.up, tokens, (number, "up"))
    elif block.gated:
        gate, up = gate.chunk(2, 1)
    inner = activation_reference(gate, up, block.activation)
    return _add_residual(linear_reference(inner, block.down, tokens, (number, "down")), summed, block.second)


def linear_reference(x: Tensor, layer: DecoderLinear, tokens: Tokens, key: tuple[int, str]) -> Tensor:
    """Apply a layer with the updates of each row's adapter to x (n, in). Returns (n, out)."""
    dtype = x.dtype
    rounded_x = x if layer.factors_dtype == torch.float32 else x.to(torch.bfloat16).to(dtype)
    if isinstance(layer.weight, BlockWeight):
        y, _ = products.linear_reference(rounded_x, products.LinearProduct.from_blocks(layer.weight))
    elif layer.scale is not None:
        quantized, row_scales = quantize_activations_reference(x, layer.smooth_scales)
        sums = (quantized.to(dtype) - 128) @ layer.weight.to(dtype).t()
        y = sums * row_scales[:, None].to(dtype) * layer.scale.to(dtype)
    else:
        y = rounded_x @ layer.weight.to(dtype).t()
    if layer.bias is not None:
        y = y + layer.bias.to(dtype)
    for rows, factors in tokens.groups:
        if key in factors:
            A, panels = (factor.to(dtype) for factor in factors[key])
            B = _unpack_panels(panels, len(A), layer.outputs)
            y = y.index_add(0, rows, (rounded_x[rows] @ A.t()) @ B)
    return y


def head_reference(x: Tensor, norm: Norm | None, head: DecoderLinear, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Apply the final norm to rows (k, D) and compute their logits (k, V)."""
    hidden = _norm(x, norm)
    return hidden, linear_reference(hidden, head, tokens, (-1, HEAD))


def _queries_keys_values(n: Tensor, number: int, block: DecoderBlock, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    heads = block.heads
    key_heads = block.key_heads
    size = block.head_size
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


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, block: DecoderBlock | AttentionForm, cache: FactorPair, tokens: Tokens
) -> Tensor:
    """Write keys and values to the cache, and compute causal attention of rows (n, heads, d) within sequences."""
    keys, values = cache
    pages = tokens.page_table.long()
    positions = tokens.positions.long()
    sequence = tokens.sequence.long()
    page = pages[sequence, positions // tokens.page_tokens]
    slot = positions % tokens.page_tokens
    keys[page, :, :, slot] = k.to(keys.dtype)
    values[page, :, slot] = v.to(values.dtype)
    out = torch.empty_like(q)
    group = block.heads // block.key_heads
    for number in sequence.unique().tolist():
        rows = (sequence == number).nonzero()[:, 0]
        query_positions = positions[rows]
        first = 0
        last = int(query_positions.max()) + 1
        if block.window is not None:
            first = max(0, int(query_positions.min()) - block.window + 1) // tokens.page_tokens
        page_indices = pages[number, first : -(-last // tokens.page_tokens)]
        key_positions = torch.arange(first * tokens.page_tokens, last, device=q.device)
        key = keys[page_indices].permute(1, 2, 0, 3).flatten(2)[..., : len(key_positions)].to(q.dtype)
        value = values[page_indices].transpose(0, 1).flatten(1, 2)[:, : len(key_positions)].to(q.dtype)
        query = q[rows].unflatten(1, (-1, group)).permute(1, 2, 0, 3)  # (key heads, group, rows, d)
        scores = block.scaling * (query @ key[:, None])
        if block.softcap is not None:
            scores = block.softcap * torch.tanh(scores / block.softcap)
        visible = key_positions <= query_positions[:, None]
        if block.window is not None:
            visible &= query_positions[:, None] - key_positions < block.window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        value = value.masked_fill(~visible.any(0)[:, None], 0.0)  # invisible values may be NaN
        out[rows] = (weights @ value[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _norm(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else norm.reference(x)


def _over_heads(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else _norm(x.reshape(-1, x.shape[-1]), norm).view(x.shape)


def _add_residual(y: Tensor, stream: Tensor, norms: HalfNorms) -> Tensor:
    """Add the residual stream and apply the norms after a half."""
    return _norm(stream + _norm(y, norms.after), norms.post)
