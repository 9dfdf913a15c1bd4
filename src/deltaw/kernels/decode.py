"""One step of a decoder over many sequences: rows of tokens in, logits out, with an adapter for each row.

Rows of a step are tokens: one of each sequence that is being written, a chunk of each prompt that is being
read. All go through every block together, so weights are read once for all of them. Keys and values lie in
pages of ``page_tokens`` tokens, which sequences may share. What a row gives does not depend on the rows
beside it, to the bit.

The step is one call of the compiled kernels, or :mod:`deltaw.kernels.decode_reference` where there are none.
Knows tensors, pages and adapters; not models, tokens, or which request a row belongs to.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.block_linear import BlockWeight
from deltaw.kernels.bounds import check_shape
from deltaw.kernels.decode_reference import (
    HEAD,
    LAYERS,
    DecoderBlock,
    DecoderLinear,
    Factors,
    Pair,
    Tokens,
    block_reference,
    cached,
    check_norm,
    end_reference,
    in_panels,
    numbers_of_head,
)
from deltaw.kernels.large_pages import in_one_piece, large_empty
from deltaw.kernels.rows import ACTIVATIONS, Norm, described
from deltaw.kernels.structs import DecodeBlock, DecodeFactors, DecodeLinear, DecodeModel, DecodeStep

_SPLITS = ("apart", "stacked", "grouped")  # by the numbers of csrc/block.h
# Of an adapter: LAYERS of each block, and the head's.
Table: TypeAlias = "ctypes.Array[DecodeFactors]"


def adapter_table(factors: Factors, blocks: int) -> Table:
    """Where an adapter's factors lie; the caller keeps them alive."""
    table: Table = (DecodeFactors * (blocks * len(LAYERS) + 1))()
    for (number, name), (A, B) in factors.items():
        at = blocks * len(LAYERS) if name == HEAD else number * len(LAYERS) + LAYERS.index(name)
        table[at] = DecodeFactors(A.data_ptr(), B.data_ptr(), len(A))
    return table


# Tokens of a page: a whole number of vectors of any processor.
PAGE_TOKENS = 32


class Pages:
    """Room for keys and values in pages; a page holds those of all layers for some tokens of one sequence.

    Attributes:
        data: (count, numbers), one block of memory, which the system provides as pages are first written.
            The order of numbers is that of whichever implementation writes them.
    """

    def __init__(self, count: int, numbers: int, dtype: torch.dtype) -> None:
        self.count, self.data = count, large_empty(count * numbers, dtype).view(count, numbers)

    def copy(self, from_page: int, to_page: int) -> None:
        """Make ``to_page`` hold what ``from_page`` holds."""
        self.data[to_page].copy_(self.data[from_page])


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter's factors as a decoder reads them, in one piece of memory: A (r, in), and B in panels with
    the scaling in it, as csrc/decode.h says.

    Args:
        factors: by (number of the block, name of the layer); the head's by (-1, "head").
        table: where they lie, for the compiled kernels.
    """

    factors: Factors
    table: Table

    @property
    def bytes(self) -> int:
        return sum(factor.nbytes for pair in self.factors.values() for factor in pair)


class Decoder:
    """A model's blocks, last norm and head, ready to be run step by step.

    Args:
        tables: rotary positions' (cosine, sine), each (positions, n) with n the numbers turned, or half of
            them where both halves of a head are turned alike.
        cache_dtype: of keys and values, fp32 or bf16.
        logits_scale, logits_softcap: z = scale·logits, then softcap·tanh(z / softcap) where there is one.

    Raises:
        ValueError: the parts do not fit each other.
    """

    page_tokens = PAGE_TOKENS

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
            raise ValueError(f"keys and values are kept in fp32 or bf16, not {cache_dtype}")
        self.blocks, self.final_norm, self.head = tuple(blocks), final_norm, head
        turned = {block.table: block.turned for block in self.blocks if block.turned}
        self.tables = [
            (_whole_table(cosine, turned.get(number, 0)), _whole_table(sine, turned.get(number, 0)))
            for number, (cosine, sine) in enumerate(tables)
        ]
        self.cache_dtype, self.logits_softcap, self.logits_scale = cache_dtype, logits_softcap, logits_scale
        self.hidden = head.inputs
        for number, block in enumerate(self.blocks):
            if block.hidden != self.hidden:
                raise ValueError(f"block {number} is {block.hidden} numbers wide, not {self.hidden}")
            if block.turned:
                self._check_table(number, block)
        check_norm(final_norm, self.hidden)
        self.offsets = [0]
        for block in self.blocks:
            numbers = block.key_heads * numbers_of_head(block.head_size, cache_dtype) * PAGE_TOKENS
            self.offsets.append(self.offsets[-1] + numbers)
        self._alive: list[object] = []  # what the structs point to
        self._model = self._described()

    def _described(self) -> DecodeModel:
        """The kernels' struct of it; made once, so that a step hands over its rows alone."""
        blocks = (DecodeBlock * len(self.blocks))(*map(self._block, self.blocks, self.offsets))
        addresses = ctypes.c_void_p * max(1, len(self.tables))
        turns = [addresses(*(table.data_ptr() for table in tables)) for tables in zip(*self.tables, strict=True)]
        pointed_to = (blocks, *(turns or (addresses(), addresses())))
        self._alive += pointed_to
        positions = min((len(self.tables[b.table][0]) for b in self.blocks if b.turned), default=2**31 - 1)
        return DecodeModel(
            *map(ctypes.addressof, pointed_to),
            *(len(self.blocks), len(self.tables), positions, self.hidden),
            *(loader.number(self.cache_dtype), PAGE_TOKENS, self.offsets[-1]),
            *(self.logits_scale, self.logits_softcap or 0.0),
            described(self.final_norm),
            self._linear(self.head),
        )

    def _block(self, block: DecoderBlock, offset: int) -> DecodeBlock:
        layers = dict(block.layers())
        return DecodeBlock(
            *(block.heads, block.key_heads, block.head_size, ACTIVATIONS.index(block.activation)),
            *(block.window or 0, block.turned, block.table, _SPLITS.index(block.split)),
            *(block.gated, block.parallel, offset, block.scaling, block.softcap or 0.0),
            *(norms.described() for norms in (block.first, block.second)),
            *map(described, (block.query_norm, block.key_norm)),
            *(self._linear(layers[name]) if name in layers else DecodeLinear() for name in LAYERS),
        )

    def _linear(self, layer: DecoderLinear) -> DecodeLinear:
        weight, sums = layer.weight, None
        if isinstance(weight, BlockWeight):
            described = weight.described()
            self._alive.append(described)
            address, kind = ctypes.addressof(described), weight.number
        else:
            address, kind = weight.data_ptr(), loader.number(weight.dtype)
            if layer.scale is not None:
                # A part at a time, since torch makes a copy in int32.
                sums = torch.cat([rows.sum(1, dtype=torch.int32) for rows in weight.split(1024)])
                self._alive.append(sums)
        return DecodeLinear(
            address,
            *map(loader.address, (layer.scale, layer.columns, layer.bias, sums)),
            *(layer.inputs, layer.outputs, kind),
        )

    def _check_table(self, number: int, block: DecoderBlock) -> None:
        if not 0 <= block.table < len(self.tables):
            raise ValueError(f"block {number} uses rotary table {block.table} of {len(self.tables)}")
        cosine, sine = self.tables[block.table]
        check_shape("the cosines", cosine, len(cosine), block.turned)
        check_shape("the sines", sine, len(cosine), block.turned)

    @property
    def bytes_per_page(self) -> int:
        """Bytes that keys and values of ``page_tokens`` tokens take."""
        return self.offsets[-1] * self.cache_dtype.itemsize

    def new_pages(self, count: int) -> Pages:
        """Room for ``count`` pages, not initialized."""
        return Pages(count, self.offsets[-1], self.cache_dtype)

    def pack_adapter(self, factors: Mapping[tuple[int, str], tuple[Tensor, Tensor, float]]) -> PackedAdapter:
        """An adapter for :meth:`step`.

        Args:
            factors: A (in, r), B (r, out) and the scaling, by (number of the block, name of the layer as in
                :class:`DecoderBlock`); of the head by (-1, "head") or (number of blocks, "head"). Layers that
                are not there are not adapted; ranks may differ.

        Raises:
            ValueError: there is no such layer, or the factors do not fit it.
        """
        packed = {}
        for (number, name), (A, B, scaling) in factors.items():
            layer = self._layer(number, name)
            rank = A.shape[1] if A.dim() == 2 else 0
            check_shape(f"A of {name} in block {number}", A, layer.inputs, rank)
            check_shape(f"B of {name} in block {number}", B, rank, layer.outputs)
            if rank:
                place, dtype = (-1, HEAD) if name == HEAD else (number, name), layer.factors_dtype
                scaled = (B.detach().float() * scaling).to(dtype)
                packed[place] = A.detach().float().t().to(dtype), in_panels(scaled)
        together = _in_one_piece(packed)
        return PackedAdapter(together, adapter_table(together, len(self.blocks)))

    def _layer(self, number: int, name: str) -> DecoderLinear:
        if name == HEAD and number in (-1, len(self.blocks)):
            return self.head
        layers = dict(self.blocks[number].layers()) if 0 <= number < len(self.blocks) else {}
        if name not in layers:
            raise ValueError(f"there is no layer '{name}' in block {number}")
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
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run rows of tokens through the model, writing their keys and values to their pages.

        Args:
            hidden: (n, D) fp32, the tokens' embeddings.
            positions: (n) int32, from 0. Rows of one sequence ascend by one.
            sequence: (n) int32: which row of ``page_table`` a token belongs to.
            page_table: (s, most) int32: page i of a row holds its positions i·page_tokens and on. Only
                entries that a row's tokens attend to are read.
            adapter: (n) int32: a place in ``adapters``, or -1 for none.
            wanted: (k) int32: the rows whose outputs are asked for; None for all.

        Returns:
            hidden (k, D) after the last norm, and logits (k, V), both in fp32.

        Raises:
            ValueError, TypeError: shapes or types do not fit. IndexError: a position, a page, an adapter or
            a wanted row lies outside of what there is.
        """
        n = len(hidden)
        if adapter is None:
            adapter = torch.full((n,), -1, dtype=torch.int32)
        if wanted is None:
            wanted = torch.arange(n, dtype=torch.int32)
        check_shape("the rows", hidden, n, self.hidden)
        for name, rows in (("positions", positions), ("the sequences", sequence), ("the adapters", adapter)):
            check_shape(name, rows, n)
        if page_table.dim() != 2 or wanted.dim() != 1:
            raise ValueError("the page table is a matrix, and the wanted rows are a list")
        if any(t.dtype != torch.int32 for t in (positions, sequence, page_table, adapter, wanted)):
            raise TypeError("positions, sequences, pages, adapters and wanted rows are int32")
        if hidden.dtype != torch.float32:
            raise TypeError(f"a step's rows are fp32, not {hidden.dtype}")
        check_shape("the pages", pages.data, pages.count, self.offsets[-1])
        if pages.data.dtype != self.cache_dtype:
            raise TypeError(f"the pages are {pages.data.dtype}, not {self.cache_dtype}")
        if loader.library() is None or hidden.device.type != "cpu":
            return reference_step(self, pages, hidden, positions, sequence, page_table, adapter, adapters, wanted)
        told = [t.contiguous() for t in (hidden, positions, sequence, adapter, page_table, wanted)]
        out, logits = torch.empty(len(wanted), self.hidden), torch.empty(len(wanted), self.head.outputs)
        tables = (ctypes.c_void_p * len(adapters))(*(ctypes.addressof(packed.table) for packed in adapters))
        step = DecodeStep(
            *(t.data_ptr() for t in told),
            ctypes.addressof(tables),
            *(t.data_ptr() for t in (pages.data, out, logits)),
            *(n, *page_table.shape, len(wanted), len(adapters), pages.count),
        )
        loader.kernels().dw_decode(ctypes.addressof(self._model), ctypes.addressof(step))
        return out, logits


# Which phase of a block, or behind all blocks, reads a layer's factors.
_PHASE = {"query": 0, "key": 0, "value": 0, "output": 1, "gate": 2, "up": 2, "down": 3, HEAD: 4}


def _in_one_piece(factors: Factors) -> dict[tuple[int, str], Pair]:
    """The factors in the order in which a step reads them: of each phase the As, then the Bs."""
    order = [(number, _PHASE[name], half, name) for number, name in factors for half in (0, 1)]
    order.sort(key=lambda at: (at[3] == HEAD, *at[:3]))
    copies = in_one_piece([factors[number, name][half] for number, _, half, name in order])
    lie = {(number, name, half): copy for (number, _, half, name), copy in zip(order, copies, strict=True)}
    return {(number, name): (lie[number, name, 0], lie[number, name, 1]) for number, name in factors}


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
    wanted: Tensor,
) -> tuple[Tensor, Tensor]:
    """The reference implementation of :meth:`Decoder.step`; in float64 where ``hidden`` is."""
    count, most = page_table.shape
    longest = min([most * decoder.page_tokens, *(len(cosine) for cosine, _ in decoder.tables)])
    for name, values, least, end in (
        ("position", positions, 0, longest),
        ("sequence", sequence, 0, count),
        ("adapter", adapter, -1, len(adapters)),
        ("wanted row", wanted, 0, len(positions)),
    ):
        _check_values(name, values, least, end)
    of_new = page_table[sequence.long(), (positions // decoder.page_tokens).long()]
    _check_values("page", of_new, 0, pages.count)
    factors = [packed.factors for packed in adapters]
    tokens = Tokens(positions, sequence, page_table, adapter, factors, decoder.page_tokens)
    x = hidden
    for number, block in enumerate(decoder.blocks):
        table = decoder.tables[block.table] if block.turned else None
        cache = cached(pages.data, block, decoder.offsets[number], decoder.page_tokens)
        x = block_reference(x, number, block, table, cache, tokens)
    rows = wanted.long()
    normed, logits = end_reference(x[rows], decoder.final_norm, decoder.head, tokens.of(rows))
    logits = logits * decoder.logits_scale
    if decoder.logits_softcap:
        logits = decoder.logits_softcap * torch.tanh(logits / decoder.logits_softcap)
    return normed, logits


def _check_values(name: str, values: Tensor, least: int, end: int) -> None:
    if values.numel() and not (least <= int(values.min()) and int(values.max()) < end):
        raise IndexError(f"a {name} is outside of {least} … {end - 1}")


def _whole_table(table: Tensor, turned: int) -> Tensor:
    """(positions, turned): the half is said once where both are turned alike."""
    table = table.detach().to(torch.float32)
    return (torch.cat([table, table], 1) if 2 * table.shape[1] == turned else table).contiguous()
