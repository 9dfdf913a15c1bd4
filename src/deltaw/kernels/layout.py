"""A flat row of tokens and its forest of segments: who sees whom, cut into tiles of work.

A token sees its own segment up to itself, and all of the segment's ancestors. Packing without padding is the
forest without edges; rows that begin alike hang under one segment that is computed once.

This module knows positions and visibility only; not what the tokens are, nor any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# A tile costs a handful of kernel calls whatever its size; measured on a 2-core AVX-512 machine, that fixed
# part equals the arithmetic of about this many (query, key) pairs over all heads of a small model.
PAIRS_PER_CALL = 3000
# Queries per tile at most: longer ones waste arithmetic above the diagonal and spill out of the cache.
LARGEST_ATOM = 128
LARGEST_TILE = 256


@dataclass(frozen=True)
class Tile:
    """Queries ``start:stop`` of the flat row against the keys in ``keys`` (ranges of the flat row, in order).

    ``hidden`` is a bool tensor (stop - start, number of keys), True where a query must not see a key; None
    where it sees them all.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    hidden: Tensor | None

    @property
    def key_count(self) -> int:
        return sum(stop - start for start, stop in self.keys)


@dataclass(eq=False)
class Layout:
    """The forest over a flat row of T tokens.

    Args:
        starts, stops: where each of S segments lies in the flat row; they follow one another without gaps,
            parents before their children.
        parents: index of each segment's parent, -1 for a root.
    """

    starts: np.ndarray
    stops: np.ndarray
    parents: np.ndarray
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _tiles: dict[int | None, list[Tile]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], parents: Sequence[int] | None = None) -> Layout:
        """Segments of these lengths one after another; without ``parents``, a forest without edges."""
        stops = np.cumsum(np.asarray(lengths, dtype=np.int64))
        starts = stops - np.asarray(lengths, dtype=np.int64)
        above = np.full(len(lengths), -1) if parents is None else np.asarray(parents)
        return cls(starts, stops, above.astype(np.int64))

    def __post_init__(self) -> None:
        children = np.arange(len(self.parents))
        if len(self.starts) == 0 or self.starts[0] != 0 or (self.starts[1:] != self.stops[:-1]).any():
            raise ValueError("segments must follow one another from 0 without gaps")
        if (self.parents >= children).any():
            raise ValueError("a segment's parent must stand before it")

    @property
    def length(self) -> int:
        """Tokens in the flat row."""
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

    def visible(self, window: int | None = None) -> np.ndarray:
        """The whole visibility as a bool array (T, T): the plain twin of :meth:`tiles`.

        Args:
            window: a query sees keys at most ``window - 1`` positions back; None for no limit.
        """
        segment = np.repeat(np.arange(len(self.starts)), self.stops - self.starts)
        return self._visible(self._ancestry(), segment, segment, *2 * (self.positions(),), window)

    def tiles(self, window: int | None = None) -> list[Tile]:
        """The row cut into tiles that cover every visible pair, at about the least cost; kept once made."""
        if window not in self._tiles:
            self._tiles[window] = self._plan(window)
        return self._tiles[window]

    def _ancestry(self) -> np.ndarray:
        """(S, S) bool: [i, j] is True where segment j is i or an ancestor of i."""
        count = len(self.parents)
        ancestry = np.eye(count, dtype=bool)
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                ancestry[segment] |= ancestry[parent]
        return ancestry

    @staticmethod
    def _visible(
        ancestry: np.ndarray,
        query_segment: np.ndarray,
        key_segment: np.ndarray,
        query_position: np.ndarray,
        key_position: np.ndarray,
        window: int | None,
    ) -> np.ndarray:
        back = query_position[:, None] - key_position[None, :]
        seen = ancestry[query_segment[:, None], key_segment[None, :]] & (back >= 0)
        return seen & (back < window) if window is not None else seen

    def _plan(self, window: int | None) -> list[Tile]:
        atoms = self._atoms(window)
        best = [0.0] + [float("inf")] * len(atoms)
        cut = [0] * (len(atoms) + 1)
        for first in range(len(atoms)):
            spans: dict[int, tuple[int, int]] = {}
            for last in range(first, len(atoms)):
                queries = atoms[last].stop - atoms[first].start
                if last > first and queries > LARGEST_TILE:
                    break
                for segment, (low, high) in atoms[last].spans.items():
                    known = spans.get(segment, (low, high))
                    spans[segment] = (min(low, known[0]), max(high, known[1]))
                cost = best[first] + PAIRS_PER_CALL + queries * sum(b - a for a, b in spans.values())
                if cost < best[last + 1]:
                    best[last + 1], cut[last + 1] = cost, first
        bounds, end = [], len(atoms)
        while end > 0:
            bounds.append((cut[end], end))
            end = cut[end]
        ancestry, positions = self._ancestry(), self.positions()
        segments = np.repeat(np.arange(len(self.starts)), self.stops - self.starts)
        return [
            self._tile(atoms[first:end], ancestry, segments, positions, window)
            for first, end in reversed(bounds)
        ]

    def _atoms(self, window: int | None) -> list[_Atom]:
        """Each segment in pieces of at most LARGEST_ATOM queries, with the key spans that each piece needs."""
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

    def _tile(
        self,
        atoms: Sequence[_Atom],
        ancestry: np.ndarray,
        segments: np.ndarray,
        positions: np.ndarray,
        window: int | None,
    ) -> Tile:
        spans: dict[int, tuple[int, int]] = {}
        for atom in atoms:
            for segment, (low, high) in atom.spans.items():
                known = spans.get(segment, (low, high))
                spans[segment] = (min(low, known[0]), max(high, known[1]))
        ranges: list[tuple[int, int]] = []
        for low, high in sorted(spans.values()):
            if ranges and ranges[-1][1] == low:
                ranges[-1] = (ranges[-1][0], high)
            else:
                ranges.append((low, high))
        queries = np.arange(atoms[0].start, atoms[-1].stop)
        keys = np.concatenate([np.arange(low, high) for low, high in ranges])
        seen = self._visible(
            ancestry, segments[queries], segments[keys], positions[queries], positions[keys], window
        )
        hidden = None if seen.all() else torch.from_numpy(~seen).to(self.device)
        return Tile(atoms[0].start, atoms[-1].stop, tuple(ranges), hidden)


@dataclass(frozen=True)
class _Atom:
    start: int
    stop: int
    spans: dict[int, tuple[int, int]]
