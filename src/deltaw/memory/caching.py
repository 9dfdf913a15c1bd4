"""Simulation of torch's CUDA caching allocator, which reserves segments of memory and splits them into blocks."""

from __future__ import annotations

from bisect import bisect_left, insort

# Constants of CUDACachingAllocator.cpp, in bytes. Blocks are multiples of BLOCK. Blocks up to SMALL are in segments of
# SMALL_SEGMENT, larger ones in segments of LARGE_SEGMENT. From OWN_SEGMENT on, a block has a segment of its size.
BLOCK = 512
MIB = 2**20
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT = 10 * MIB
SEGMENT_MULTIPLE = 2 * MIB


class CachingAllocator:
    """Allocator that never frees a segment. torch does so only if the device has no memory left.

    Attributes:
        reserved_bytes: Total size of the segments.
    """

    def __init__(self) -> None:
        self.reserved_bytes = self._end = 0
        # Free blocks: sorted (size, start) per pool (True: small), sizes by start, and starts by end.
        self._pools: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._sizes = dict[int, int]()
        self._starts = dict[int, int]()

    def allocate(self, size: int) -> tuple[int, int]:
        """Return the start and the size of a block of at least ``size`` bytes. Small remainders are not split off."""
        size = -(-size // BLOCK) * BLOCK
        pool = self._pools[size <= SMALL]
        min_remainder = BLOCK if size <= SMALL else SMALL + 1
        if (index := bisect_left(pool, (size, 0))) < len(pool):
            total, start = pool[index]
            self._take(start, size <= SMALL)
        else:
            rounded = -(-size // SEGMENT_MULTIPLE) * SEGMENT_MULTIPLE
            total = SMALL_SEGMENT if size <= SMALL else LARGE_SEGMENT if size < OWN_SEGMENT else rounded
            start = self._end
            self._end += total + BLOCK  # blocks of different segments are not neighbors
            self.reserved_bytes += total
        if total - size >= min_remainder:
            self._add(start + size, total - size, size <= SMALL)
            total = size
        return start, total

    def free(self, start: int, size: int) -> None:
        """Free a block and merge it with free neighbors."""
        is_small = size <= SMALL
        if start + size in self._sizes:
            size += self._take(start + size, is_small)
        if start in self._starts:
            before = self._starts[start]
            start = before
            size = size + self._take(before, is_small)
        self._add(start, size, is_small)

    def _take(self, start: int, is_small: bool) -> int:
        """Remove a free block and return its size."""
        size = self._sizes.pop(start)
        del self._starts[start + size]
        pool = self._pools[is_small]
        del pool[bisect_left(pool, (size, start))]
        return size

    def _add(self, start: int, size: int, is_small: bool) -> None:
        insort(self._pools[is_small], (size, start))
        self._sizes[start] = size
        self._starts[start + size] = start
