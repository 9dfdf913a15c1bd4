"""Layout of packed rows: a prefix tree of segments in one token sequence, and its partition into attention tiles.

A token attends to its segment up to its position and to all ancestors of the segment. Padding-free packing is the tree
without edges. Rows that share a prefix are children of one segment, which is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Overhead of a tile within a batch, in (query, key) pairs over all heads of a small model. Measured on a 2-core AVX-512
# machine. Padding pairs count as pairs.
PAIRS_PER_TILE = 1500
# Overhead of a batch of tiles (about thirty kernel calls), in pairs.
PAIRS_PER_BATCH = 6000
# Maximum queries per atom and tile. Larger tiles waste arithmetic above the diagonal and do not fit in the cache.
MAX_ATOM_QUERIES = 128
MAX_TILE_QUERIES = 256
# Tiles are padded to multiples of these, so that tiles of one shape can be batched. Repeated shapes also reuse the
# kernels that the CPU's matrix library generates and caches per shape.
QUERY_GRID = 16
KEY_GRID = 32
# A tile with more pairs than this occupies all cores. Smaller tiles are batched up to BATCH_PAIRS.
LARGE_TILE_PAIRS = 128 * 256
BATCH_PAIRS = 2**20


@dataclass(frozen=True)
class Tile:
    """Queries ``start:stop`` of the packed sequence and the ascending ranges of keys that they attend to."""

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Padded numbers of queries and keys."""
        return _round_up(self.stop - self.start, QUERY_GRID), _round_up(self.key_count, KEY_GRID)

    @property
    def key_count(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class TileBatch:
    """n tiles of one shape, computed together: L queries and K keys each.

    Attributes:
        keys: (n, K) positions of the keys in the packed sequence. Padding is position 0 and masked.
        hidden: (n, L, W) bool mask of the **last** W keys, True if a query must not attend to the key. All queries
            attend to the keys before. A padding query attends to at least the first key.
        queries: L.
    """

    keys: Tensor
    hidden: Tensor
    queries: int

    @property
    def count(self) -> int:
        return self.keys.shape[0]


@dataclass(frozen=True)
class Tiles:
    """A row partitioned into batches of tiles.

    Attributes:
        batches: Batches in the order of their queries in ``gather``.
        gather: (S) position in the packed sequence of each query, batch by batch.
        slots: (T) index in ``gather`` of each position of the packed sequence.
        filling: Indices in ``gather`` of padding queries.
    """

    batches: list[TileBatch]
    gather: Tensor
    slots: Tensor
    filling: Tensor


@dataclass(eq=False)
class Layout:
    """Prefix tree of packed rows with T tokens and S segments.

    Attributes:
        starts: (S) first position of each segment in the packed sequence. Segments are contiguous, and parents precede
            their children.
        stops: (S) end position of each segment (exclusive).
        parents: (S) index of each segment's parent, -1 for a root.
        device: Device of the tensors in :meth:`tiles`.
        masks: Cached tensors of other modules, by their keys: masks and ends of the rows of
            :mod:`deltaw.kernels.gpu_attention`, chunks of recurrences, and predecessors of tokens.
        cached_tensors: Tensors that other modules derived for this row, by the id of the source tensor and its use.

    Raises:
        ValueError: if the arrays do not describe such a tree.
    """

    starts: np.ndarray
    stops: np.ndarray
    parents: np.ndarray
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _tiles: dict[tuple[int | None, bool], Tiles] = field(default_factory=dict, repr=False)
    _segments: Tensor | None = field(default=None, repr=False)
    masks: dict[Any, Any] = field(default_factory=dict, repr=False)
    cached_tensors: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], parents: Sequence[int] | None = None) -> Layout:
        """Create a layout of contiguous segments. Without ``parents``, all segments are roots."""
        stops = np.cumsum(np.asarray(lengths, dtype=np.int64))
        starts = stops - np.asarray(lengths, dtype=np.int64)
        above = np.full(len(lengths), -1) if parents is None else np.asarray(parents)
        return cls(starts, stops, above.astype(np.int64))

    def __post_init__(self) -> None:
        for name, table in {"starts": self.starts, "stops": self.stops, "parents": self.parents}.items():
            if table.ndim != 1 or not np.issubdtype(table.dtype, np.integer):
                raise ValueError(f"{name} must be a one-dimensional integer array")
            if len(table) != len(self.starts):
                raise ValueError(f"got {len(self.starts)} starts and {len(table)} {name}")
        if len(self.starts) == 0 or self.starts[0] != 0 or (self.starts[1:] != self.stops[:-1]).any():
            raise ValueError("segments must start at 0 and follow one another without gaps")
        if (self.stops < self.starts).any():
            raise ValueError("a segment must not end before it starts")
        if (self.parents >= np.arange(len(self.parents))).any():
            raise ValueError("a segment's parent must precede it")
        if (self.parents < -1).any():
            raise ValueError("a segment's parent must be an index, or -1 for none")

    @property
    def length(self) -> int:
        """Number of tokens in the packed sequence."""
        return int(self.stops[-1])

    def offsets(self, sizes: np.ndarray | None = None) -> np.ndarray:
        """Return the position of each segment's first token within its example, (S).

        Args:
            sizes: (S) number of positions of each segment, by default its number of tokens.
        """
        offsets = np.zeros(len(self.starts), dtype=np.int64)
        sizes = self.stops - self.starts if sizes is None else sizes
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                offsets[segment] = offsets[parent] + sizes[parent]
        return offsets

    def positions(self, steps: np.ndarray | None = None) -> np.ndarray:
        """Return the position of each token within its example, counted from the root, (T).

        Args:
            steps: (T) distance from each token to the next position, 1 by default.
        """
        before = np.arange(self.length + 1) if steps is None else np.concatenate([[0], np.cumsum(steps)])
        starts = before[self.starts]
        stops = before[self.stops]
        return before[:-1] + np.repeat(self.offsets(stops - starts) - starts, self.stops - self.starts)

    def segments(self) -> Tensor:
        """Return starts, stops, parents and offsets as one int64 tensor (4, S). The tensor is cached."""
        if self._segments is None:
            rows = np.stack([self.starts, self.stops, self.parents, self.offsets()])
            self._segments = torch.from_numpy(rows.astype(np.int64))
        return self._segments

    def visible(self, window: int | None = None) -> np.ndarray:
        """Return the attention mask as a bool array (T, T). Reference implementation of :meth:`tiles`.

        Args:
            window: Sliding-window size. A query attends to keys at most ``window - 1`` positions back. None is
                unlimited.
        """
        indices = np.arange(self.length)
        return self._visibility(window)(indices, indices)

    def tiles(self, window: int | None = None, *, causal: bool = True) -> Tiles:
        """Return tiles that cover all visible pairs at approximately minimal cost. The result is cached.

        Args:
            window: Sliding-window size, as for :meth:`visible`.
            causal: False if tokens also attend to later tokens of their segment.
        """
        key = window, causal
        if key not in self._tiles:
            self._tiles[key] = self._batched(self._plan(window, causal), window, causal)
        return self._tiles[key]

    def _visibility(self, window: int | None, causal: bool = True) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Return a function from query indices (L) and key indices (K) to a bool mask (L, K)."""
        ancestry = np.eye(len(self.parents), dtype=bool)  # [i, j]: segment j is i or an ancestor of i
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                ancestry[segment] |= ancestry[parent]
        segments = np.repeat(np.arange(len(self.starts)), self.stops - self.starts)
        positions = self.positions()

        def visible(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
            distance = positions[queries][:, None] - positions[keys]
            mask = ancestry[segments[queries][:, None], segments[keys]]
            if causal:
                mask &= distance >= 0
            return mask & (distance < window) if window is not None else mask

        return visible

    def _plan(self, window: int | None, causal: bool) -> list[Tile]:
        """Merge adjacent atoms into tiles by dynamic programming over the last cut."""
        atoms = self._atoms(window, causal)
        best = [0.0] + [float("inf")] * len(atoms)
        tiles: list[Tile | None] = [None] * (len(atoms) + 1)
        cut = [0] * (len(atoms) + 1)
        for first in range(len(atoms)):
            spans: dict[int, tuple[int, int]] = {}
            for last in range(first, len(atoms)):
                if last > first and atoms[last].stop - atoms[first].start > MAX_TILE_QUERIES:
                    break
                for segment, (low, high) in atoms[last].spans.items():
                    span = spans.get(segment, (low, high))
                    spans[segment] = (min(low, span[0]), max(high, span[1]))
                tile = Tile(atoms[first].start, atoms[last].stop, _merge_ranges(spans.values()))
                queries, keys = tile.shape
                cost = best[first] + PAIRS_PER_TILE + queries * keys
                if cost < best[last + 1]:
                    best[last + 1] = cost
                    cut[last + 1] = first
                    tiles[last + 1] = tile
        chosen: list[Tile] = []
        end = len(atoms)
        while end > 0:
            chosen_tile = tiles[end]
            assert chosen_tile is not None
            chosen.append(chosen_tile)
            end = cut[end]
        return chosen[::-1]

    def _atoms(self, window: int | None, causal: bool) -> list[_Atom]:
        """Split segments into atoms of at most MAX_ATOM_QUERIES queries, with the key ranges that they attend to."""
        atoms: list[_Atom] = []
        offsets = self.offsets()
        for segment, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True)):
            for low in range(int(start), int(stop), MAX_ATOM_QUERIES):
                high = min(low + MAX_ATOM_QUERIES, int(stop))
                earliest = 0 if window is None else int(offsets[segment] + low - start) - window + 1
                spans: dict[int, tuple[int, int]] = {}
                ancestor = segment
                while ancestor >= 0:
                    last = high if causal and ancestor == segment else int(self.stops[ancestor])
                    first = int(self.starts[ancestor]) + max(0, earliest - int(offsets[ancestor]))
                    if first < last:
                        spans[ancestor] = (first, last)
                    ancestor = int(self.parents[ancestor])
                atoms.append(_Atom(low, high, spans))
        return atoms

    def _batched(self, tiles: list[Tile], window: int | None, causal: bool) -> Tiles:
        by_shape = _group_by_shape(tiles)
        visible = self._visibility(window, causal)
        batches = []
        gather = []
        padding = []
        slots = np.zeros(self.length, dtype=np.int64)
        num_queries = 0
        for (queries, keys), group in by_shape.items():
            pairs = queries * keys
            batch_size = 1 if pairs > LARGE_TILE_PAIRS else max(1, BATCH_PAIRS // pairs)
            for batch_tiles in (group[i : i + batch_size] for i in range(0, len(group), batch_size)):
                count = _round_up(len(batch_tiles), 1)
                query_indices = np.zeros((count, queries), dtype=np.int64)
                key_indices = np.zeros((count, keys), dtype=np.int64)
                mask = np.zeros((count, queries, keys), dtype=bool)
                mask[:, :, 0] = True
                for n, tile in enumerate(batch_tiles):
                    height = tile.stop - tile.start
                    width = tile.key_count
                    rows = np.arange(tile.start, tile.stop)
                    columns = np.concatenate([np.arange(low, high) for low, high in tile.ranges])
                    query_indices[n, :height] = rows
                    key_indices[n, :width] = columns
                    slots[rows] = num_queries + n * queries + np.arange(height)
                    mask[n, :height, :width] = visible(rows, columns)
                    mask[n, :height, width:] = False
                num_used = [t.stop - t.start for t in batch_tiles] + [0] * (count - len(batch_tiles))
                batch_padding = np.concatenate([n * queries + np.arange(u, queries) for n, u in enumerate(num_used)])
                batches.append(self._batch(key_indices, mask, batch_padding))
                gather.append(query_indices.ravel())
                padding.append(num_queries + batch_padding)
                num_queries += query_indices.size
        return Tiles(batches, *map(self._tensor, (np.concatenate(gather), slots, np.concatenate(padding))))

    def _batch(self, keys: np.ndarray, mask: np.ndarray, padding: np.ndarray) -> TileBatch:
        count, queries, _ = mask.shape
        hidden_rows = ~mask
        hidden_rows.reshape(count * queries, -1)[padding] = False
        hidden_columns = hidden_rows.any(axis=(0, 1))
        first = int(np.argmax(hidden_columns)) if hidden_columns.any() else mask.shape[2]
        return TileBatch(self._tensor(keys), self._tensor(np.ascontiguousarray(hidden_rows[:, :, first:])), queries)

    def _tensor(self, indices: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(indices), self.device)


def _group_by_shape(tiles: Sequence[Tile]) -> dict[tuple[int, int], list[Tile]]:
    """Group tiles by shape. A small group is padded to a larger existing shape if that saves a batch."""
    groups: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        groups.setdefault(tile.shape, []).append(tile)
    for shape in sorted(groups, key=lambda s: s[0] * s[1]):
        larger = [s for s in groups if s != shape and s[0] >= shape[0] and s[1] >= shape[1]]
        if not larger:
            continue
        best = min(larger, key=lambda s: s[0] * s[1])
        if len(groups[shape]) * (best[0] * best[1] - shape[0] * shape[1]) < PAIRS_PER_BATCH:
            groups[best] = groups[best] + groups.pop(shape)
    return groups


def _merge_ranges(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort ranges and merge adjacent ones."""
    ranges: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if ranges and ranges[-1][1] == low:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return tuple(ranges)


def _round_up(count: int, multiple: int) -> int:
    """Round ``count`` up to a multiple of ``multiple``, or of an eighth of its power of two if that is larger."""
    step = max(multiple, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


# Maps tokens (T,) and their layout to numbers (T,) that are added to the positions of the tokens.
PositionShifts = Callable[[np.ndarray, Layout], np.ndarray]


@dataclass(frozen=True)
class _Atom:
    start: int
    stop: int
    spans: dict[int, tuple[int, int]]


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. Copies from the CPU to a CUDA device are asynchronous.

    torch's pinned-memory allocator reuses the pinned buffer only after the device has read it.
    """
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)
