"""Chunks of a packed row, for layers that carry a state from token to token.

A segment is cut into chunks. The first chunk of a segment continues the state after the last chunk of its parent. A
chunk's level is the number of chunks before it. All chunks of a level are computed together, level by level.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.layout import Layout, to_device


@dataclass(frozen=True)
class ChunkLevel:
    """Chunks ``start`` to ``stop`` (exclusive), whose states continue chunks of the previous level.

    Attributes:
        parents: (n,) index of the chunk that each chunk continues, relative to the previous level's ``start``. None in
            the first level, which starts without a state.
    """

    start: int
    stop: int
    parents: Tensor | None


@dataclass(frozen=True)
class Chunks:
    """N chunks of up to C tokens, in ascending order of their levels.

    Attributes:
        positions: (N, C) position of each token in the packed row. Padding is position 0.
        used: (N, C) bool, False for padding at the end of a chunk.
        slots: (T,) index in the flattened (N, C) of each position of the packed row.
        levels: Levels in order.
    """

    positions: Tensor
    used: Tensor
    slots: Tensor
    levels: tuple[ChunkLevel, ...]

    def gather(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (T, heads, d) as (N, heads, C, d) in ``dtype``. Padding is 0."""
        is_padding = ~self.used[..., None, None]
        return tokens[self.positions].to(dtype).masked_fill_(is_padding, 0).transpose(1, 2).contiguous()

    def scatter(self, values: Tensor) -> Tensor:
        """Return (N, heads, C, d) as (T, heads, d)."""
        return values.transpose(1, 2).flatten(0, 1)[self.slots]


def count_chunks(layout: Layout, size: int) -> tuple[int, int]:
    """Return the numbers of chunks and of levels for chunks of ``size`` tokens."""
    counts = -(-(layout.stops - layout.starts) // size)
    ends = np.zeros(len(counts), dtype=np.int64)
    for segment, parent in enumerate(layout.parents.tolist()):
        ends[segment] = counts[segment] + (ends[parent] if parent >= 0 else 0)
    return int(counts.sum()), int(ends.max(initial=0))


def chunks_of(layout: Layout, size: int) -> Chunks:
    """Return the chunks of a layout. The result is cached per size.

    Args:
        size: Maximum number of tokens per chunk.
    """
    key = ("chunks", size)
    if key not in layout.masks:
        layout.masks[key] = _cut(layout, size)
    chunks: Chunks = layout.masks[key]
    return chunks


def _cut(layout: Layout, size: int) -> Chunks:
    starts: list[int] = []
    stops: list[int] = []
    levels: list[int] = []
    previous_chunks: list[int] = []
    last_chunks: list[int] = []  # of each segment, or of its parent if it is empty; -1 if there is none
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
    used = grid < np.asarray(stops, dtype=np.int64)[order][:, None]
    slots = np.empty(layout.length, dtype=np.int64)
    slots[grid[used]] = np.flatnonzero(used)
    tensors = (torch.from_numpy(array) for array in (np.where(used, grid, 0), used, slots))
    positions, is_used, token_slots = (to_device(tensor, layout.device) for tensor in tensors)
    parents = np.where(np.asarray(previous_chunks) < 0, -1, rank[previous_chunks])[order]
    return Chunks(positions, is_used, token_slots, _levels(np.bincount(levels), parents, layout.device))


def _levels(counts: np.ndarray, parents: np.ndarray, device: torch.device) -> tuple[ChunkLevel, ...]:
    """Return levels of ``counts`` chunks each, from the chunk that each chunk continues."""
    levels: list[ChunkLevel] = []
    start = 0
    for count in counts.tolist():
        stop = start + count
        above = parents[start:stop] - levels[-1].start if levels else None
        levels.append(ChunkLevel(start, stop, None if above is None else to_device(torch.from_numpy(above), device)))
        start = stop
    return tuple(levels)
