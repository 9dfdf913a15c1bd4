"""One decoding step over a batch of sequences: token embeddings in, logits out, with an adapter per row.

The rows of a step are tokens: one per generating sequence, and chunks of prompts. All rows pass through each block
together, so weights are read once per step. Keys and values are stored in pages of ``page_tokens`` tokens, which
sequences can share. The result of a row is bitwise independent of the other rows.

A step is one call of the compiled kernels. Without them, :mod:`deltaw.kernels.decode_reference` is used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.decode_reference import (
    HEAD,
    LAYERS,
    DecoderBlock,
    DecoderLinear,
    FactorPair,
    Factors,
    Tokens,
    block_reference,
    cache_numbers_per_token,
    cache_views,
    check_norm,
    head_reference,
    pack_panels,
)
from deltaw.kernels.huge_pages import copy_contiguous, empty_in_huge_pages
from deltaw.kernels.loader import DecodeBlock, DecodeFactors, DecodeLinear, DecodeModel, DecodeStep
from deltaw.kernels.operators import check_shape
from deltaw.kernels.rows import ACTIVATIONS, Norm, norm_struct

_SPLITS = ("apart", "stacked", "grouped")  # in the order of the constants in csrc/block.h
# Factors of an adapter: LAYERS of each block, then the head.
Table: TypeAlias = "ctypes.Array[DecodeFactors]"


def adapter_table(factors: Factors, blocks: int) -> Table:
    """Return the kernels' table of an adapter's factors. The caller must keep the factors alive."""
    table: Table = (DecodeFactors * (blocks * len(LAYERS) + 1))()
    for (number, name), (A, B) in factors.items():
        index = blocks * len(LAYERS) if name == HEAD else number * len(LAYERS) + LAYERS.index(name)
        table[index] = DecodeFactors(A.data_ptr(), B.data_ptr(), len(A))
    return table


# Tokens per page: a multiple of every CPU's vector length.
PAGE_TOKENS = 32


class Pages:
    """Pool of pages for keys and values. A page contains those of all layers for some tokens of one sequence.

    Attributes:
        count: Number of pages.
        data: (count, numbers per page). One allocation, whose memory the system provides on first write. The order of
            numbers within a page depends on the implementation that writes it.
        states: (sequences, numbers) fp32 states of recurrent layers, or None if the model has none.
    """

    states: Tensor | None = None

    def __init__(self, count: int, numbers: int, dtype: torch.dtype) -> None:
        self.count = count
        self.data = empty_in_huge_pages(count * numbers, dtype).view(count, numbers)

    def copy(self, from_page: int, to_page: int) -> None:
        """Copy the contents of ``from_page`` to ``to_page``."""
        self.data[to_page].copy_(self.data[from_page])


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter's factors in the decoder's format, in one allocation.

    A is (r, in). B is in panels and multiplied by the scaling; see csrc/decode.h.

    Attributes:
        factors: Factors by (block number, layer name). The head's key is (-1, "head").
        table: Addresses of the factors for the compiled kernels.
    """

    factors: Factors
    table: Table

    @property
    def bytes(self) -> int:
        return sum(factor.nbytes for pair in self.factors.values() for factor in pair)


class Decoder:
    """Blocks, final norm and head of a model, prepared for decoding steps.

    Args:
        blocks: Blocks in order.
        final_norm: Norm before the head, or None.
        head: Output layer.
        tables: (cosine, sine) of rotary positions, each (positions, n). n is the number of rotary dimensions, or half
            of it if both halves of a head use the same angles.
        cache_dtype: Type of keys and values, fp32 or bf16.
        logits_softcap: If set, z becomes softcap·tanh(z / softcap).
        logits_scale: Factor of the logits: z = scale·logits.

    Raises:
        ValueError: if the parts do not match.
    """

    page_tokens = PAGE_TOKENS
    state_bytes = 0  # of recurrent layers, per sequence

    def __init__(
        self,
        blocks: Sequence[DecoderBlock],
        final_norm: Norm | None,
        head: DecoderLinear,
        tables: Sequence[tuple[Tensor, Tensor]] = (),
        *,
        cache_dtype: torch.dtype = torch.float32,
        logits_softcap: float | None = None,
        logits_scale: float = 1.0,
    ) -> None:
        if cache_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"keys and values must be fp32 or bf16, not {cache_dtype}")
        self.blocks = tuple(blocks)
        self.final_norm = final_norm
        self.head = head
        rotary_dims = {block.table: block.rotary_dims for block in self.blocks if block.rotary_dims}
        self.tables = [
            (_full_table(cosine, rotary_dims.get(number, 0)), _full_table(sine, rotary_dims.get(number, 0)))
            for number, (cosine, sine) in enumerate(tables)
        ]
        self.cache_dtype = cache_dtype
        self.logits_softcap = logits_softcap
        self.logits_scale = logits_scale
        self.hidden = head.inputs
        for number, block in enumerate(self.blocks):
            if block.hidden != self.hidden:
                raise ValueError(f"block {number} has hidden size {block.hidden}, not {self.hidden}")
            if block.rotary_dims:
                self._check_table(number, block)
        check_norm(final_norm, self.hidden)
        self.offsets = [0]
        for block in self.blocks:
            numbers = block.key_heads * cache_numbers_per_token(block.head_size, cache_dtype) * PAGE_TOKENS
            self.offsets.append(self.offsets[-1] + numbers)
        self._alive: list[object] = []  # objects that the structs point to
        self._model = self._build_struct()

    def _build_struct(self) -> DecodeModel:
        """Build the kernels' struct of the model. It is built once, so that a step only passes its rows."""
        blocks = (DecodeBlock * len(self.blocks))(*map(self._block, self.blocks, self.offsets))
        addresses = ctypes.c_void_p * max(1, len(self.tables))
        rotary = [addresses(*(table.data_ptr() for table in tables)) for tables in zip(*self.tables, strict=True)]
        arrays = (blocks, *(rotary or (addresses(), addresses())))
        self._alive += arrays
        positions = min((len(self.tables[b.table][0]) for b in self.blocks if b.rotary_dims), default=2**31 - 1)
        return DecodeModel(
            *map(ctypes.addressof, arrays),
            *(len(self.blocks), len(self.tables), positions, self.hidden),
            *(loader.dtype_code(self.cache_dtype), PAGE_TOKENS, self.offsets[-1]),
            *(self.logits_scale, self.logits_softcap or 0.0),
            norm_struct(self.final_norm),
            self._linear(self.head),
        )

    def _block(self, block: DecoderBlock, offset: int) -> DecodeBlock:
        layers = dict(block.layers())
        return DecodeBlock(
            *(block.heads, block.key_heads, block.head_size, ACTIVATIONS.index(block.activation)),
            *(block.window or 0, block.rotary_dims, block.table, _SPLITS.index(block.split)),
            *(block.gated, block.parallel, offset, block.scaling, block.softcap or 0.0),
            *(norms.as_struct() for norms in (block.first, block.second)),
            *map(norm_struct, (block.query_norm, block.key_norm)),
            *(self._linear(layers[name]) if name in layers else DecodeLinear() for name in LAYERS),
        )

    def _linear(self, layer: DecoderLinear) -> DecodeLinear:
        weight = layer.weight
        sums = None
        if isinstance(weight, BlockWeight):
            block_data = weight.as_struct()
            self._alive.append(block_data)
            address = ctypes.addressof(block_data)
            type_code = weight.block_format.number
        else:
            address = weight.data_ptr()
            type_code = loader.dtype_code(weight.dtype)
            if layer.scale is not None:
                # In chunks, because torch converts the input to int32.
                sums = torch.cat([rows.sum(1, dtype=torch.int32) for rows in weight.split(1024)])
                self._alive.append(sums)
        return DecodeLinear(
            address,
            *map(loader.address, (layer.scale, layer.smooth_scales, layer.bias, sums)),
            *(layer.inputs, layer.outputs, type_code),
        )

    def _check_table(self, number: int, block: DecoderBlock) -> None:
        if not 0 <= block.table < len(self.tables):
            raise ValueError(f"block {number} uses rotary table {block.table} of {len(self.tables)}")
        cosine, sine = self.tables[block.table]
        check_shape("the cosines", cosine, len(cosine), block.rotary_dims)
        check_shape("the sines", sine, len(cosine), block.rotary_dims)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of the keys and values of ``page_tokens`` tokens."""
        return self.offsets[-1] * self.cache_dtype.itemsize

    def new_pages(self, count: int, sequences: int = 1) -> Pages:
        """Return ``count`` uninitialized pages for a number of sequences."""
        return Pages(count, self.offsets[-1], self.cache_dtype)

    def pack_adapter(self, factors: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]]) -> PackedAdapter:
        """Pack an adapter for :meth:`step`.

        Args:
            factors: A (in, r), B (r, out) and the scaling, by (block number, layer name as in :class:`DecoderBlock`).
                The head's key is (-1, "head") or (number of blocks, "head"). Missing layers are not adapted. Ranks may
                differ.

        Raises:
            ValueError: if a layer is unknown or its factors do not match.
        """
        packed = {}
        for (number, name), (A, B, scaling) in factors.items():
            layer = self._layer(number, name)
            rank = A.shape[1] if A.dim() == 2 else 0
            check_shape(f"A of {name} in block {number}", A, layer.inputs, rank)
            check_shape(f"B of {name} in block {number}", B, rank, layer.outputs)
            if rank:
                key = (-1, HEAD) if name == HEAD else (number, name)
                dtype = layer.factors_dtype
                scaled = (B.detach().float() * scaling).to(dtype)
                packed[key] = A.detach().float().t().to(dtype), pack_panels(scaled)
        contiguous = _pack_factors(packed)
        return PackedAdapter(contiguous, adapter_table(contiguous, len(self.blocks)))

    def _layer(self, number: int, name: str) -> DecoderLinear:
        if name == HEAD and number in (-1, len(self.blocks)):
            return self.head
        layers = dict(self.blocks[number].layers()) if 0 <= number < len(self.blocks) else {}
        if name not in layers:
            raise ValueError(f"no layer '{name}' in block {number}")
        return layers[name]

    def step(
        self,
        pages: Pages,
        hidden: Tensor,
        positions: Tensor,
        sequence: Tensor,
        page_table: Tensor,
        adapter: Tensor | None = None,
        adapters: Sequence[PackedAdapter] = (),
        output_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run rows of tokens through the model and write their keys and values to the pages.

        Args:
            pages: Page pool.
            hidden: (n, D) fp32 token embeddings.
            positions: (n) int32 positions from 0. Rows of one sequence ascend by one.
            sequence: (n) int32 index of each token's row in ``page_table``.
            page_table: (s, p) int32. Page i of a row contains positions from i·page_tokens. Only entries that the row's
                tokens attend to are read.
            adapter: (n) int32 index in ``adapters``, or -1 for the base model. None is -1 for all rows.
            adapters: Adapters of the step.
            output_rows: (k) int32 rows whose outputs are computed, or None for all.

        Returns:
            Hidden states (k, D) after the final norm and logits (k, V), both fp32.

        Raises:
            ValueError, TypeError: if shapes or types do not match.
            IndexError: if a position, sequence, page, adapter or output row is out of bounds.
        """
        n = len(hidden)
        if adapter is None:
            adapter = torch.full((n,), -1, dtype=torch.int32)
        if output_rows is None:
            output_rows = torch.arange(n, dtype=torch.int32)
        check_shape("the rows", hidden, n, self.hidden)
        for name, rows in (("positions", positions), ("the sequences", sequence), ("the adapters", adapter)):
            check_shape(name, rows, n)
        if page_table.dim() != 2 or output_rows.dim() != 1:
            raise ValueError("the page table must have two dimensions, and the output rows one")
        if any(t.dtype != torch.int32 for t in (positions, sequence, page_table, adapter, output_rows)):
            raise TypeError("positions, sequences, pages, adapters and output rows must be int32")
        if hidden.dtype != torch.float32:
            raise TypeError(f"the rows of a step must be fp32, not {hidden.dtype}")
        check_shape("the pages", pages.data, pages.count, self.offsets[-1])
        if pages.data.dtype != self.cache_dtype:
            raise TypeError(f"the pages must be {self.cache_dtype}, not {pages.data.dtype}")
        if loader.library() is None or hidden.device.type != "cpu":
            return reference_step(self, pages, hidden, positions, sequence, page_table, adapter, adapters, output_rows)
        inputs = [t.contiguous() for t in (hidden, positions, sequence, adapter, page_table, output_rows)]
        out = torch.empty(len(output_rows), self.hidden)
        logits = torch.empty(len(output_rows), self.head.outputs)
        tables = (ctypes.c_void_p * len(adapters))(*(ctypes.addressof(packed.table) for packed in adapters))
        step = DecodeStep(
            *(t.data_ptr() for t in inputs),
            ctypes.addressof(tables),
            *(t.data_ptr() for t in (pages.data, out, logits)),
            *(n, *page_table.shape, len(output_rows), len(adapters), pages.count),
        )
        loader.kernels().dw_decode(ctypes.addressof(self._model), ctypes.addressof(step))
        return out, logits


class LinearDecoder(Decoder):
    """A linear layer as a decoder without blocks, with a short path for its calls.

    Args:
        layer: The layer, without low-rank factors.
    """

    def __init__(self, layer: DecoderLinear) -> None:
        super().__init__((), None, layer)
        self._pages = self.new_pages(1)

    def product(self, x: Tensor, adapter: Tensor | None, adapters: Sequence[PackedAdapter]) -> Tensor:
        """Return the outputs (n, out) of rows x (n, in) in fp32. Other arguments are those of :meth:`Decoder.step`.

        Raises:
            ValueError: if the number of rows differs from that of ``adapter``.
        """
        zeros, minus_ones, rows = _row_numbers(len(x))
        if adapter is None or not adapters:
            adapter = minus_ones
            adapters = ()
        check_shape("the adapters", adapter, len(x))
        x = x.float().contiguous()
        if loader.library() is None:
            return self.step(self._pages, x, zeros, zeros, zeros[:1, None], adapter, adapters, rows)[1]
        out = torch.empty(len(x), self.hidden)
        outputs = torch.empty(len(x), self.head.outputs)
        tables = (ctypes.c_void_p * len(adapters))(*(ctypes.addressof(packed.table) for packed in adapters))
        zero = zeros.data_ptr()
        step = DecodeStep(
            *(x.data_ptr(), zero, zero, adapter.data_ptr(), zero, rows.data_ptr()),
            ctypes.addressof(tables),
            *(self._pages.data.data_ptr(), out.data_ptr(), outputs.data_ptr()),
            *(len(x), 1, 1, len(x), len(adapters), 1),
        )
        loader.kernels().dw_decode(ctypes.addressof(self._model), ctypes.addressof(step))
        return outputs


@functools.lru_cache(maxsize=64)
def _row_numbers(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return int32 tensors of ``count`` rows: zeros, -1, and the index of each row."""
    zeros = torch.zeros(count, dtype=torch.int32)
    return zeros, zeros - 1, torch.arange(count, dtype=torch.int32)


# Phase of a block, or after all blocks, that reads the factors of a layer.
_PHASE = {"query": 0, "key": 0, "value": 0, "output": 1, "gate": 2, "up": 2, "down": 3, HEAD: 4}


def _pack_factors(factors: Factors) -> dict[tuple[int, str], FactorPair]:
    """Copy the factors to one allocation in the order that a step reads them: per phase the As, then the Bs."""
    order = [(number, _PHASE[name], half, name) for number, name in factors for half in (0, 1)]
    order.sort(key=lambda key: (key[3] == HEAD, *key[:3]))
    copies = copy_contiguous([factors[number, name][half] for number, _, half, name in order])
    copy_of = {(number, name, half): copy for (number, _, half, name), copy in zip(order, copies, strict=True)}
    return {(number, name): (copy_of[number, name, 0], copy_of[number, name, 1]) for number, name in factors}


@torch.no_grad()
def reference_step(
    decoder: Decoder,
    pages: Pages,
    hidden: Tensor,
    positions: Tensor,
    sequence: Tensor,
    page_table: Tensor,
    adapter: Tensor,
    adapters: Sequence[PackedAdapter],
    output_rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """Reference implementation of :meth:`Decoder.step`. Computes in fp64 if ``hidden`` is fp64."""
    count, max_pages = page_table.shape
    max_positions = min([max_pages * decoder.page_tokens, *(len(cosine) for cosine, _ in decoder.tables)])
    for name, values, low, end in (
        ("position", positions, 0, max_positions),
        ("sequence", sequence, 0, count),
        ("adapter", adapter, -1, len(adapters)),
        ("output row", output_rows, 0, len(positions)),
    ):
        _check_range(name, values, low, end)
    _check_range("page", page_table[sequence.long(), (positions // decoder.page_tokens).long()], 0, pages.count)
    factors = [packed.factors for packed in adapters]
    tokens = Tokens(positions, sequence, page_table, adapter, factors, decoder.page_tokens)
    x = hidden
    for number, block in enumerate(decoder.blocks):
        table = decoder.tables[block.table] if block.rotary_dims else None
        cache = cache_views(pages.data, block, decoder.offsets[number], decoder.page_tokens)
        x = block_reference(x, number, block, table, cache, tokens)
    rows = output_rows.long()
    normed, logits = head_reference(x[rows], decoder.final_norm, decoder.head, tokens.select(rows))
    logits = logits * decoder.logits_scale
    if decoder.logits_softcap:
        logits = decoder.logits_softcap * torch.tanh(logits / decoder.logits_softcap)
    return normed, logits


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    if values.numel() and not (low <= int(values.min()) and int(values.max()) < high):
        raise IndexError(f"{name} out of bounds, expected {low} … {high - 1}")


def _full_table(table: Tensor, rotary_dims: int) -> Tensor:
    """Return a rotary table as (positions, rotary_dims). Duplicates it if it covers one half."""
    table = table.detach().to(torch.float32)
    return (torch.cat([table, table], 1) if 2 * table.shape[1] == rotary_dims else table).contiguous()
