"""A decoder as the compiled kernels see it: its parts by address, and the call of a step.

The structs are made once. A step hands over addresses of its rows alone. Knows tensors and addresses; not
whether the kernels may be used, nor what a step means: see :mod:`deltaw.kernels.decode`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltaw.kernels import loader
from deltaw.kernels.block_formats import BlockWeight
from deltaw.kernels.decode_parts import (
    HEAD,
    LAYERS,
    DecoderBlock,
    DecoderLinear,
    DecoderNorm,
    DecoderNorms,
)
from deltaw.kernels.rows import ACTIVATIONS
from deltaw.kernels.structs import (
    BlockData,
    DecodeBlock,
    DecodeFactors,
    DecodeLinear,
    DecodeModel,
    DecodeStep,
    HalfNorms,
    RowNorm,
)

_SPLITS = ("apart", "stacked", "grouped")  # by the numbers of csrc/block.h
# Of an adapter: LAYERS of each block, and the head's.
Table: TypeAlias = "ctypes.Array[DecodeFactors]"


@dataclass(frozen=True, eq=False)
class Parts:
    """What a :class:`deltaw.kernels.decode.Decoder` consists of; ``offsets`` are of its blocks in a page."""

    blocks: Sequence[DecoderBlock]
    final_norm: DecoderNorm | None
    head: DecoderLinear
    tables: Sequence[tuple[Tensor, Tensor]]
    cache_dtype: torch.dtype
    page_tokens: int
    offsets: Sequence[int]
    logits_scale: float
    logits_softcap: float


class CompiledDecoder:
    """The structs of a decoder, and all that they point to."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._sums: list[Tensor] = []
        self._described: list[BlockData] = []
        pairs = zip(parts.blocks, parts.offsets, strict=False)
        self._blocks = (DecodeBlock * len(parts.blocks))(*(self._block(*pair) for pair in pairs))
        addresses = ctypes.c_void_p * max(1, len(parts.tables))
        self._cosines = addresses(*(cosine.data_ptr() for cosine, _ in parts.tables))
        self._sines = addresses(*(sine.data_ptr() for _, sine in parts.tables))
        self._model = DecodeModel(
            *(ctypes.addressof(of) for of in (self._blocks, self._cosines, self._sines)),
            *(len(parts.blocks), len(parts.tables), self._positions(), parts.head.inputs),
            *(loader.number(parts.cache_dtype), parts.page_tokens, parts.offsets[-1]),
            *(parts.logits_scale, parts.logits_softcap),
            _norm(parts.final_norm),
            self._linear(parts.head),
        )

    def _positions(self) -> int:
        """How many positions there are."""
        used = {block.table for block in self._parts.blocks if block.turned}
        return min((len(self._parts.tables[table][0]) for table in used), default=2**31 - 1)

    def step(
        self,
        pages: Tensor,
        hidden: Tensor,
        adapters: Sequence[Table],
        positions: Tensor,
        sequence: Tensor,
        page_table: Tensor,
        adapter: Tensor,
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`deltaw.kernels.decode.Decoder.step`; all tensors are contiguous.

        Raises:
            IndexError: a position, page, sequence, adapter or wanted row is out of bounds.
        """
        out = torch.empty(len(wanted), hidden.shape[1])
        logits = torch.empty(len(wanted), self._parts.head.outputs)
        tables = (ctypes.c_void_p * len(adapters))(*map(ctypes.addressof, adapters))
        step = DecodeStep(
            *(t.data_ptr() for t in (hidden, positions, sequence, adapter, page_table, wanted)),
            ctypes.addressof(tables),
            *(t.data_ptr() for t in (pages, out, logits)),
            *(len(hidden), *page_table.shape, len(wanted), len(adapters), len(pages)),
        )
        loader.kernels().dw_decode(ctypes.addressof(self._model), ctypes.addressof(step))
        return out, logits

    def _block(self, block: DecoderBlock, offset: int) -> DecodeBlock:
        layers = dict(block.layers())
        return DecodeBlock(
            *(block.heads, block.key_heads, block.head_size, ACTIVATIONS.index(block.activation)),
            *(block.window or 0, block.turned, block.table, _SPLITS.index(block.split)),
            *(block.gated, block.parallel, offset, block.scaling, block.softcap or 0.0),
            *(_half(norms) for norms in (block.first, block.second)),
            *(_norm(norm) for norm in (block.query_norm, block.key_norm)),
            *(self._linear(layers[name]) if name in layers else DecodeLinear() for name in LAYERS),
        )

    def _linear(self, layer: DecoderLinear) -> DecodeLinear:
        weight, sums = layer.weight, None
        if isinstance(weight, BlockWeight):
            described = weight.described()
            self._described.append(described)
            address, kind = ctypes.addressof(described), weight.number
        else:
            address, kind = weight.data_ptr(), loader.number(weight.dtype)
            if layer.scale is not None:
                sums = weight.sum(1, dtype=torch.int32)
                self._sums.append(sums)
        return DecodeLinear(
            address,
            *map(loader.address, (layer.scale, layer.columns, layer.bias, sums)),
            *(layer.inputs, layer.outputs, kind),
        )


def adapter_table(factors: Mapping[tuple[int, str], tuple[Tensor, Tensor]], blocks: int) -> Table:
    """Where an adapter's factors lie; the caller keeps them alive."""
    table: Table = (DecodeFactors * (blocks * len(LAYERS) + 1))()
    for (number, name), (A, B) in factors.items():
        at = blocks * len(LAYERS) if name == HEAD else number * len(LAYERS) + LAYERS.index(name)
        table[at] = DecodeFactors(A.data_ptr(), B.data_ptr(), len(A))
    return table


def _half(norms: DecoderNorms) -> HalfNorms:
    return HalfNorms(*(_norm(norm) for norm in (norms.before, norms.after, norms.post)))


def _norm(of: DecoderNorm | None) -> RowNorm:
    if of is None:
        return RowNorm()
    return RowNorm(*map(loader.address, (of.weight, of.bias)), of.eps, of.offset, of.centered, True)
