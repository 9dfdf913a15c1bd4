"""Chunks of a packed row, for layers that carry a state from token to token.

Each segment is cut into chunks. The first chunk of a segment continues the state after the last chunk of the parent
segment. The level of a chunk is the number of chunks before it on the path from the root. Levels are computed one after
the other, and all chunks of a level together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import Layout, to_device


@dataclass(frozen=True)
class ChunkLevel:
    """Chunks of one level: ``start`` to ``stop`` (exclusive). Their states continue chunks of the previous level.

    Attributes:
        parents: (n,) index of the chunk that each chunk continues, relative to ``start`` of the previous level. None in
            the first level.
    """

    start: int
    stop: int
    parents: Tensor | None


@dataclass(frozen=True)
class Chunks:
    """N chunks of up to C tokens, sorted by level.

    Attributes:
        positions: (N, C) position of each token in the packed row. Padding is position 0.
        is_token: (N, C) bool, False for padding at the end of a chunk.
        slots: (T,) index of each token of the packed row in the flattened (N, C) grid.
        levels: Levels in order.
    """

    positions: Tensor
    is_token: Tensor
    slots: Tensor
    levels: tuple[ChunkLevel, ...]

    def gather(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (T, heads, d) as (N, heads, C, d) in ``dtype``. Padding is 0."""
        is_padding = ~self.is_token[..., None, None]
        return tokens[self.positions].to(dtype).masked_fill_(is_padding, 0).transpose(1, 2).contiguous()

    def scatter(self, values: Tensor) -> Tensor:
        """Return (N, heads, C, d) as (T, heads, d)."""
        return values.transpose(1, 2).flatten(0, 1)[self.slots]


def count_chunks(layout: Layout, size: int) -> tuple[int, int]:
    """Return the numbers of chunks and of levels for chunks of ``size`` tokens."""
    counts = -(-(layout.stops - layout.starts) // size)
    depths = np.zeros(len(counts), dtype=np.int64)
    for segment, parent in enumerate(layout.parents.tolist()):
        depths[segment] = counts[segment] + (depths[parent] if parent >= 0 else 0)
    return int(counts.sum()), int(depths.max(initial=0))


def chunks_of(layout: Layout, size: int) -> Chunks:
    """Return the chunks of a layout. The layout caches them by size.

    Args:
        size: Maximum number of tokens per chunk.
    """
    key = ("chunks", size)
    if key not in layout.masks:
        layout.masks[key] = _cut_layout(layout, size)
    chunks: Chunks = layout.masks[key]
    return chunks


def _cut_layout(layout: Layout, size: int) -> Chunks:
    """Cut a layout into chunks. The lists contain one value per chunk, in the order of the segments."""
    starts: list[int] = []
    stops: list[int] = []
    levels: list[int] = []
    previous_chunks: list[int] = []
    last_chunks: list[int] = []  # last chunk of each segment. Empty segments inherit it, and -1 means none.
    for start, stop, parent in zip(layout.starts.tolist(), layout.stops.tolist(), layout.parents.tolist(), strict=True):
        previous = last_chunks[parent] if parent >= 0 else -1
        for low in range(start, stop, size):
            starts.append(low)
            stops.append(min(low + size, stop))
            levels.append(levels[previous] + 1 if previous >= 0 else 0)
            previous_chunks.append(previous)
            previous = len(starts) - 1
        last_chunks.append(previous)
    order = np.argsort(np.asarray(levels, dtype=np.int64), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    grid = np.asarray(starts, dtype=np.int64)[order][:, None] + np.arange(size)
    is_token = grid < np.asarray(stops, dtype=np.int64)[order][:, None]
    slots = np.empty(layout.length, dtype=np.int64)
    slots[grid[is_token]] = np.flatnonzero(is_token)
    tensors = (torch.from_numpy(array) for array in (np.where(is_token, grid, 0), is_token, slots))
    positions, is_used, token_slots = (to_device(tensor, layout.device) for tensor in tensors)
    parents = np.where(np.asarray(previous_chunks) < 0, -1, rank[previous_chunks])[order]
    return Chunks(positions, is_used, token_slots, _chunk_levels(np.bincount(levels), parents, layout.device))


def _chunk_levels(counts: np.ndarray, parents: np.ndarray, device: torch.device) -> tuple[ChunkLevel, ...]:
    """Return the levels.

    Args:
        counts: Number of chunks of each level.
        parents: (N,) index of the chunk that each chunk continues, -1 for none.
        device: Device of the levels' tensors.
    """
    levels: list[ChunkLevel] = []
    start = 0
    for count in counts.tolist():
        stop = start + count
        previous = None
        if levels:
            previous = to_device(torch.from_numpy(parents[start:stop] - levels[-1].start), device)
        levels.append(ChunkLevel(start, stop, previous))
        start = stop
    return tuple(levels)
