"""Memory for what kernels read at scattered places: on Linux in pages of the system's larger size.

With pages of 4 KiB nearly each piece that is read costs a walk through the page table. Knows sizes and
types; not what lies there.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

LINE = 64  # bytes of a cache line, or a whole number of them
WORTH = 4 << 20  # bytes from which a large page, of 2 MiB mostly, is filled to a good part
SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")


@functools.cache
def large_page_bytes(system: Path = SYSTEM) -> int:
    """Bytes of a large page that memory can be asked to lie in; 0 where the system gives none."""
    try:
        if "[never]" in (system / "enabled").read_text(encoding="utf-8"):
            return 0
        return int((system / "hpage_pmd_size").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def large_empty(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers), not initialized. The system provides the memory as it is first written, and takes it back
    when the tensor goes."""
    size, page = numbers * dtype.itemsize, large_page_bytes()
    if size < max(WORTH, 2 * page) or not page or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numbers, dtype=dtype)
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    begin = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % page
    whole = size // page * page
    with contextlib.suppress(OSError):  # a system that refuses: pages are of the usual size
        memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
        # Of what is left, no more is taken than is used.
        memory.madvise(mmap.MADV_NOHUGEPAGE, begin + whole, len(memory) - begin - whole)
    return torch.frombuffer(memory, dtype=dtype, count=numbers, offset=begin)


def in_one_piece(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, one behind another in one piece of memory, each at the beginning of a line."""
    sizes = [-(-part.nbytes // LINE) * LINE for part in parts]
    piece = large_empty(sum(sizes), torch.uint8)
    rooms = zip(parts, piece.split(sizes), strict=True)
    return [room[: part.nbytes].view(part.dtype).view(part.shape).copy_(part) for part, room in rooms]
