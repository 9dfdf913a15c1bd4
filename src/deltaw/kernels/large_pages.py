"""Memory for what a decoding step reads at scattered places: on Linux in pages of the system's larger size.

With pages of 4 KiB nearly each piece that is read costs a walk through the page table. Knows sizes and
types; not what lies there.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line, or a whole number of them
WORTH = 4 << 20  # bytes from which a large page, of 2 MiB mostly, is filled to a good part


def large_empty(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers), not initialized. The system provides the memory as it is first written, and takes it back
    when the tensor goes."""
    size = numbers * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < WORTH:
        return torch.empty(numbers, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them: pages are of the usual size
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=dtype)


def in_one_piece(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, one behind another in one piece of memory, each at the beginning of a line."""
    sizes = [-(-part.nbytes // LINE) * LINE for part in parts]
    piece = large_empty(sum(sizes), torch.uint8)
    copies = []
    for part, room in zip(parts, piece.split(sizes), strict=True):
        copies.append(room[: part.nbytes].view(part.dtype).view(part.shape).copy_(part))
    return copies
