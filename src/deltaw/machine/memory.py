"""Main memory: what this process may hold, what it holds and has held, and how it gives some back.

Knows nothing of models or runs, and imports no torch. The root of the file system is a parameter: a test
describes a machine in a folder.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from deltaw.machine import choices
from deltaw.machine.choices import Choice

_ROOT = Path("/")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
LARGEST_KEPT = 2**25
"""Bytes of a block above which it goes back to the system when it is freed; each glibc allows this."""


def memory_limit_bytes(root: Path = _ROOT) -> Choice[int]:
    """The bytes of main memory that this process may hold: control group or physical, the smaller."""
    physical = _sizes(root / "proc/meminfo").get("MemTotal") or int(psutil.virtual_memory().total)
    limit = choices.memory_limit(root)
    if limit is not None and limit < physical:
        return Choice(limit, "control group limit")
    return Choice(physical, "physical memory")


def free_memory_bytes(root: Path = _ROOT) -> int:
    """The bytes of main memory that this process could still take: the machine's, or its control group's."""
    available = _sizes(root / "proc/meminfo").get("MemAvailable") or int(psutil.virtual_memory().available)
    in_group = choices.memory_free(root)
    return available if in_group is None else min(available, in_group)


def swap_bytes(root: Path = _ROOT) -> tuple[int, int]:
    """The bytes of swap space in use, and of all."""
    sizes = _sizes(root / "proc/meminfo")
    if "SwapTotal" in sizes and "SwapFree" in sizes:
        return sizes["SwapTotal"] - sizes["SwapFree"], sizes["SwapTotal"]
    swap = psutil.swap_memory()
    return int(swap.used), int(swap.total)


def resident_bytes(process: int | None = None) -> int:
    """The bytes of main memory that a process holds now, this one by default; 0 for one that is gone."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


def peak_resident_bytes(root: Path = _ROOT) -> int:
    """The most bytes of main memory that this process has held so far."""
    peak = _sizes(root / "proc/self/status").get("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows, hence not above

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakWatch:
    """The most main memory that the process held while a block ran, as far as the system can tell.

    ``bytes`` is exact where the block reached a new peak of the process. Where an earlier peak was higher,
    the system cannot tell; it is then what the process held at the block's beginning or end, the larger.
    """

    bytes = 0

    def __enter__(self) -> PeakWatch:
        self._peak, self._resident = peak_resident_bytes(), resident_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        peak, resident = peak_resident_bytes(), resident_bytes()
        self.bytes = max(peak if peak > self._peak else 0, resident, self._resident)


def release_free_memory() -> None:
    """Give the memory that this process holds but does not use back to the system, where its allocator can.

    Reading a large file or a model leaves holes that later tensors seldom fit: with glibc they would stay
    resident for the whole run.
    """
    gc.collect()
    trim_memory()


# Called when freed memory is returned to the system, so that a simulated allocator can do the same.
trim_listeners: list[Callable[[], None]] = []


def trim_memory() -> None:
    """The same without collecting unreachable objects: holes that tensors of many sizes left go back."""
    library = _allocator()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    for listener in trim_listeners:
        listener()


def keep_freed_memory() -> None:
    """Let this process's allocator keep what is freed for what comes next, where it is glibc's.

    As it comes, glibc gives large blocks back to the system and gets them again, cleared page by page: up to
    a tenth of a short step. :func:`release_free_memory` still gives all back. Blocks above
    :data:`LARGEST_KEPT` are not kept: the gradient of a vocabulary's matrix seldom fits the hole that the
    last one left, once smaller tensors lie in it, and the peak would grow by such a matrix. All threads share one
    heap: what is freed in a second one is of no use to the first. Whoever has set the allocator through the
    environment keeps those settings.
    """
    options = {_M_TRIM_THRESHOLD: 2**30, _M_MMAP_THRESHOLD: LARGEST_KEPT, _M_ARENA_MAX: 1}
    set_already = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    _set_allocator(options, unless=set_already)


def give_large_blocks_back() -> None:
    """Let this process's allocator give blocks of a megabyte and more back as soon as they are freed.

    For weights that come and go, block by block, among tensors that stay: kept in one heap, the holes between
    them would add up to a large part of the model. What is free at the heap's end goes back too, since glibc
    would cut large blocks from it. Where it is not glibc's allocator, nothing happens.
    """
    if _set_allocator({_M_TRIM_THRESHOLD: 2**20, _M_MMAP_THRESHOLD: 2**20}):
        trim_memory()


def share_heaps() -> None:
    """Let threads that start from now on share the heaps of this process's allocator, where it is glibc's.

    It would make eight for each core, and what is freed in one is of no use to threads of another: many short
    requests would leave tens of megabytes in each. Whoever has set the allocator through the environment
    keeps those settings.
    """
    _set_allocator({_M_ARENA_MAX: 2}, unless=("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"))


def _allocator() -> ctypes.CDLL | None:
    """The library with this process's allocator, where it may be glibc's."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _set_allocator(options: dict[int, int], unless: tuple[str, ...] = ()) -> bool:
    """Set options of glibc's allocator, unless one of these variables is set; whether that was done."""
    library = _allocator()
    if library is None or not hasattr(library, "mallopt") or any(name in os.environ for name in unless):
        return False
    for option, value in options.items():
        library.mallopt(option, value)
    return True


def _sizes(path: Path) -> dict[str, int]:
    """The sizes that a kernel file tells in kB, in bytes by their names."""
    found = {}
    for line in choices.lines_of(path):
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[key] = int(value.split()[0]) * 1024
    return found
