"""Simulation of torch's CUDA caching allocator, which reserves memory in segments and splits them into blocks."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import torch

# From CUDACachingAllocator.cpp.
BLOCK, SMALL, MIB = 512, 2**20, 2**20
SMALL_SEGMENT, LARGE_SEGMENT, OWN_SEGMENT, SEGMENT_MULTIPLE = 2 * MIB, 20 * MIB, 10 * MIB, 2 * MIB
# Approximate size of a CUDA context with torch's kernels and libraries.
CONTEXT_BYTES = 500 * MIB
# Default size of a cuBLAS workspace: on Hopper and later, and before (4096 KiB twice and 16 KiB eight times).
WORKSPACE_BYTES = (32 * MIB, 8320 * 1024)


def context_bytes() -> int:
    """Return the size of a CUDA context, or 0 for a simulated device in torch's CPU build."""
    return 0 if torch.version.cuda is None and torch.cuda.is_available() else CONTEXT_BYTES


def workspace_bytes(device: str) -> int:
    """Return the bytes of cuBLAS workspaces: one for the forward and one for the backward thread."""
    if not context_bytes():
        return 0
    is_new = not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 9
    return 2 * WORKSPACE_BYTES[0 if is_new else 1]


def round_up(size: int, multiple: int = BLOCK) -> int:
    """Return ``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


@dataclass(slots=True, eq=False)
class Block:
    """Part of a segment, in use or free, with its neighbors."""

    size: int
    number: int
    is_small: bool
    is_used: bool = False
    before: Block | None = None
    after: Block | None = None


class CachingAllocator:
    """Allocator that never returns a segment, so that :attr:`reserved_bytes` is an upper bound.

    torch returns unused segments only if the device has no memory left.

    Attributes:
        reserved_bytes: Bytes of all segments.
    """

    def __init__(self) -> None:
        self.reserved_bytes = self._count = 0
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}

    def allocate(self, size: int) -> Block:
        """Allocate the smallest free block that is large enough, or one in a new segment."""
        size = max(BLOCK, round_up(size))
        is_small = size <= SMALL
        free = self._free[is_small]
        if (index := bisect_left(free, (size, 0))) < len(free):
            block = free.pop(index)[2]
        else:
            own = SMALL_SEGMENT if is_small else LARGE_SEGMENT
            block = self._block(own if size < OWN_SEGMENT else round_up(size, SEGMENT_MULTIPLE), is_small)
            self.reserved_bytes += block.size
        if (rest := block.size - size) >= (BLOCK if is_small else SMALL + 1):
            tail = self._block(rest, is_small)
            tail.before, tail.after, block.after, block.size = block, block.after, tail, size
            if tail.after is not None:
                tail.after.before = tail
            self._add(tail)
        block.is_used = True
        return block

    def free(self, block: Block) -> None:
        """Free a block and merge it with free neighbors."""
        block.is_used = False
        for first, second in ((block, block.after), (block.before, block)):
            if first is None or second is None or first.is_used or second.is_used:
                continue
            neighbor = second if first is block else first
            free = self._free[block.is_small]
            del free[bisect_left(free, (neighbor.size, neighbor.number))]
            first.size, first.after = first.size + second.size, second.after
            if first.after is not None:
                first.after.before = first
            block = first
        self._add(block)

    def _block(self, size: int, is_small: bool) -> Block:
        self._count += 1
        return Block(size, self._count, is_small)

    def _add(self, block: Block) -> None:
        insort(self._free[block.is_small], (block.size, block.number, block))
