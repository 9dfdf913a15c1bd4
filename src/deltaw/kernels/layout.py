"""The layout of packed rows: a prefix tree of segments over one sequence of tokens, cut into attention tiles.

A token sees its own segment up to itself, and all of the segment's ancestors. Padding-free packing is the
tree without edges; rows that share a prefix are children of one segment, which is computed once.

This module knows positions and visibility only; not what the tokens are, nor any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.kernels.transfer import to_device

# A further tile in a batch costs about the arithmetic of this many (query, key) pairs over all heads of a
# small model, measured on a 2-core AVX-512 machine; pairs that filling up to a grid adds count as pairs.
PAIRS_PER_TILE = 1500
# A further batch of tiles costs some thirty kernel calls, which equals about this many pairs.
PAIRS_PER_BATCH = 6000
# Queries per tile at most: longer ones waste arithmetic above the diagonal and spill out of the cache.
LARGEST_ATOM = 128
LARGEST_TILE = 256
# Tiles are filled up to multiples of these, so that many have the same shape and are computed together; and
# so that shapes come again, since a CPU's matrix library builds and keeps a kernel for each that it meets.
QUERY_GRID, KEY_GRID = 16, 32
# Tiles with more pairs than this fill the machine alone; smaller ones are batched up to BATCH_PAIRS.
LARGE_TILE = 128 * 256
BATCH_PAIRS = 2**20


@dataclass(frozen=True)
class Tile:
    """Queries ``start:stop`` of the packed sequence and the ranges of keys that they attend to, in order."""

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys, filled up to the grid."""
        return _on_grid(self.stop - self.start, QUERY_GRID), _on_grid(self.key_count, KEY_GRID)

    @property
    def key_count(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class TileBatch:
    """n tiles of one shape, computed together: L queries against K keys each.

    Args:
        keys: (n, K) position of each key in the packed sequence; padding of a tile is position 0, hidden.
        hidden: (n, L, W) bool, True where a query must not see one of the **last** W keys; every query sees
            those before. A query that fills a tile up sees at least the first key.
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
    """A row cut into batches of tiles.

    Args:
        batches: in the order of their queries in ``gather``.
        gather: (S,) position in the packed sequence of every query, one batch after another.
        slots: (T,) index in ``gather`` of each position of the packed sequence.
        filling: what of ``gather`` only fills tiles up.
    """

    batches: list[TileBatch]
    gather: Tensor
    slots: Tensor
    filling: Tensor


@dataclass(eq=False)
class Layout:
    """The prefix tree of packed rows with T tokens.

    Args:
        starts, stops: range of each of S segments in the packed sequence; segments follow one another
            without gaps, parents before their children.
        parents: index of each segment's parent, -1 for a root.

    Raises:
        ValueError: the three do not describe such a tree.
    """

    starts: np.ndarray
    stops: np.ndarray
    parents: np.ndarray
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _tiles: dict[int | None, Tiles] = field(default_factory=dict, repr=False)
    _segments: Tensor | None = field(default=None, repr=False)
    # FlexAttention's block masks of this row, by window (:mod:`deltaw.kernels.attention`).
    masks: dict[int | None, Any] = field(default_factory=dict, repr=False)
    # What others have made for this row once, by the id of what they made it from.
    made_of: dict[int, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], parents: Sequence[int] | None = None) -> Layout:
        """Segments of these lengths one after another; without ``parents``, a tree without edges."""
        stops = np.cumsum(np.asarray(lengths, dtype=np.int64))
        starts = stops - np.asarray(lengths, dtype=np.int64)
        above = np.full(len(lengths), -1) if parents is None else np.asarray(parents)
        return cls(starts, stops, above.astype(np.int64))

    def __post_init__(self) -> None:
        tables = {"starts": self.starts, "stops": self.stops, "parents": self.parents}
        for name, table in tables.items():
            if table.ndim != 1 or not np.issubdtype(table.dtype, np.integer):
                raise ValueError(f"{name} must be a list of whole numbers")
            if len(table) != len(self.starts):
                raise ValueError(f"there are {len(self.starts)} starts and {len(table)} {name}")
        if len(self.starts) == 0 or self.starts[0] != 0 or (self.starts[1:] != self.stops[:-1]).any():
            raise ValueError("segments must follow one another from 0 without gaps")
        if (self.stops < self.starts).any():
            raise ValueError("a segment must not end before it starts")
        if (self.parents >= np.arange(len(self.parents))).any():
            raise ValueError("a segment's parent must stand before it")
        if (self.parents < -1).any():
            raise ValueError("a segment's parent is its index, or -1 for none")

    @property
    def length(self) -> int:
        """Tokens in the packed sequence."""
        return int(self.stops[-1])

    def offsets(self) -> np.ndarray:
        """Position of each segment's first token: where its parent's tokens end. Shape (S,)."""
        offsets = np.zeros(len(self.starts), dtype=np.int64)
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                offsets[segment] = offsets[parent] + self.stops[parent] - self.starts[parent]
        return offsets

    def positions(self) -> np.ndarray:
        """Position of each token within its own example, counted from the root. Shape (T,)."""
        return np.arange(self.length) + np.repeat(self.offsets() - self.starts, self.stops - self.starts)

    def segments(self) -> Tensor:
        """Starts, stops, parents and offsets of the segments as one int64 tensor (4, S), cached."""
        if self._segments is None:
            rows = np.stack([self.starts, self.stops, self.parents, self.offsets()])
            self._segments = torch.from_numpy(rows.astype(np.int64))
        return self._segments

    def visible(self, window: int | None = None) -> np.ndarray:
        """The whole visibility as a bool array (T, T): the reference implementation of :meth:`tiles`.

        Args:
            window: a query sees keys at most ``window - 1`` positions back; None for no limit.
        """
        everywhere = np.arange(self.length)
        return self._visibility(window)(everywhere, everywhere)

    def tiles(self, window: int | None = None) -> Tiles:
        """The row cut into tiles that cover every visible pair, at about the least cost; kept once made."""
        if window not in self._tiles:
            self._tiles[window] = self._batched(self._plan(window), window)
        return self._tiles[window]

    def _visibility(self, window: int | None) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """What tells which of the keys at some places (K) the queries at others (L) see: bool (L, K)."""
        ancestry = np.eye(len(self.parents), dtype=bool)  # [i, j]: segment j is i or an ancestor of i
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                ancestry[segment] |= ancestry[parent]
        segments, positions = np.repeat(np.arange(len(self.starts)), self.stops - self.starts), self.positions()

        def sees(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
            back = positions[queries][:, None] - positions[keys]
            seen = ancestry[segments[queries][:, None], segments[keys]] & (back >= 0)
            return seen & (back < window) if window is not None else seen

        return sees

    def _plan(self, window: int | None) -> list[Tile]:
        """Neighbouring atoms become one tile where that is cheaper: dynamic programming over the last cut."""
        atoms = self._atoms(window)
        best = [0.0] + [float("inf")] * len(atoms)
        tiles: list[Tile | None] = [None] * (len(atoms) + 1)
        cut = [0] * (len(atoms) + 1)
        for first in range(len(atoms)):
            spans: dict[int, tuple[int, int]] = {}
            for last in range(first, len(atoms)):
                if last > first and atoms[last].stop - atoms[first].start > LARGEST_TILE:
                    break
                for segment, (low, high) in atoms[last].spans.items():
                    known = spans.get(segment, (low, high))
                    spans[segment] = (min(low, known[0]), max(high, known[1]))
                tile = Tile(atoms[first].start, atoms[last].stop, _joined(spans.values()))
                queries, keys = tile.shape
                cost = best[first] + PAIRS_PER_TILE + queries * keys
                if cost < best[last + 1]:
                    best[last + 1], cut[last + 1], tiles[last + 1] = cost, first, tile
        chosen: list[Tile] = []
        end = len(atoms)
        while end > 0:
            tile_here = tiles[end]
            assert tile_here is not None
            chosen.append(tile_here)
            end = cut[end]
        return chosen[::-1]

    def _atoms(self, window: int | None) -> list[_Atom]:
        """Each segment in pieces of at most LARGEST_ATOM queries, with the key spans that each needs."""
        atoms: list[_Atom] = []
        offsets = self.offsets()
        for segment, (start, stop) in enumerate(zip(self.starts, self.stops, strict=True)):
            for low in range(int(start), int(stop), LARGEST_ATOM):
                high = min(low + LARGEST_ATOM, int(stop))
                earliest = 0 if window is None else int(offsets[segment] + low - start) - window + 1
                spans: dict[int, tuple[int, int]] = {}
                at = segment
                while at >= 0:
                    end = high if at == segment else int(self.stops[at])
                    begin = int(self.starts[at]) + max(0, earliest - int(offsets[at]))
                    if begin < end:
                        spans[at] = (begin, end)
                    at = int(self.parents[at])
                atoms.append(_Atom(low, high, spans))
        return atoms

    def _batched(self, tiles: list[Tile], window: int | None) -> Tiles:
        by_shape = _grouped(tiles)
        sees = self._visibility(window)
        batches, gather, fillings = [], [], []
        slots = np.zeros(self.length, dtype=np.int64)
        filled = 0
        for (queries, keys), group in by_shape.items():
            pairs = queries * keys
            most = 1 if pairs > LARGE_TILE else max(1, BATCH_PAIRS // pairs)
            for part in (group[i : i + most] for i in range(0, len(group), most)):
                count = _on_grid(len(part), 1)
                places = np.zeros((count, queries), dtype=np.int64)
                key_places = np.zeros((count, keys), dtype=np.int64)
                seen = np.zeros((count, queries, keys), dtype=bool)
                seen[:, :, 0] = True
                for n, tile in enumerate(part):
                    height, width = tile.stop - tile.start, tile.key_count
                    rows = np.arange(tile.start, tile.stop)
                    columns = np.concatenate([np.arange(low, high) for low, high in tile.ranges])
                    places[n, :height], key_places[n, :width] = rows, columns
                    slots[rows] = filled + n * queries + np.arange(height)
                    seen[n, :height, :width] = sees(rows, columns)
                    seen[n, :height, width:] = False
                used = [t.stop - t.start for t in part] + [0] * (count - len(part))
                filling = np.concatenate([n * queries + np.arange(u, queries) for n, u in enumerate(used)])
                batches.append(self._batch(key_places, seen, filling))
                gather.append(places.ravel())
                fillings.append(filled + filling)
                filled += places.size
        return Tiles(batches, *map(self._tensor, (np.concatenate(gather), slots, np.concatenate(fillings))))

    def _batch(self, keys: np.ndarray, seen: np.ndarray, filling: np.ndarray) -> TileBatch:
        count, queries, _ = seen.shape
        hidden_rows = ~seen
        hidden_rows.reshape(count * queries, -1)[filling] = False
        hidden_columns = hidden_rows.any(axis=(0, 1))
        first = int(np.argmax(hidden_columns)) if hidden_columns.any() else seen.shape[2]
        return TileBatch(self._tensor(keys), self._tensor(np.ascontiguousarray(hidden_rows[:, :, first:])), queries)

    def _tensor(self, places: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(places), self.device)


def _grouped(tiles: Sequence[Tile]) -> dict[tuple[int, int], list[Tile]]:
    """Tiles by shape; a few small ones are filled up to a larger shape where that saves a batch."""
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


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in order, those that touch made one."""
    ranges: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if ranges and ranges[-1][1] == low:
            ranges[-1] = (ranges[-1][0], high)
        else:
            ranges.append((low, high))
    return tuple(ranges)


def _on_grid(count: int, least: int) -> int:
    """``count`` rounded up to a multiple of ``least``, or of an eighth of its power of two if more."""
    step = max(least, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


@dataclass(frozen=True)
class _Atom:
    start: int
    stop: int
    spans: dict[int, tuple[int, int]]
