"""Memory in huge pages for data that kernels read at scattered addresses (Linux only).

With 4 KiB pages almost every access to such data needs a walk of the page table.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

CACHE_LINE_BYTES = 64  # alignment: a cache line, or a multiple of one
MIN_BYTES = 4 << 20  # smaller allocations would leave much of a huge page (usually 2 MiB) unused
HUGE_PAGE_SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")


@functools.cache
def huge_page_bytes(system: Path = HUGE_PAGE_SETTINGS) -> int:
    """Return the size of a transparent huge page in bytes, or 0 if the system does not support them."""
    try:
        if "[never]" in (system / "enabled").read_text(encoding="utf-8"):
            return 0
        return int((system / "hpage_pmd_size").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def empty_in_huge_pages(count: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor of ``count`` elements.

    The system allocates pages on first write and frees them with the tensor.
    """
    size = count * dtype.itemsize
    page = huge_page_bytes()
    if size < max(MIN_BYTES, 2 * page) or not page or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % page
    page_bytes = size // page * page
    with contextlib.suppress(OSError):  # falls back to pages of the normal size
        memory.madvise(mmap.MADV_HUGEPAGE, offset, page_bytes)
        # Huge pages in the partial remainder would allocate more memory than is used.
        memory.madvise(mmap.MADV_NOHUGEPAGE, offset + page_bytes, len(memory) - offset - page_bytes)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def copy_contiguous(parts: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors into one contiguous allocation. Each copy starts at a cache line."""
    sizes = [-(-part.nbytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES for part in parts]
    slices = zip(parts, empty_in_huge_pages(sum(sizes), torch.uint8).split(sizes), strict=True)
    return [target[: part.nbytes].view(part.dtype).view(part.shape).copy_(part) for part, target in slices]
