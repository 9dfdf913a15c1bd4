"""Measure the main memory of the process and configure the return of memory from its allocator to the system.

Imports no torch. The root of the file system is a parameter, so that tests can describe a machine in a folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from deltaw.machine import container_limits
from deltaw.machine.choices import Choice

_ROOT = Path("/")
# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
MAX_RETAINED_BYTES = 2**25
"""Size in bytes above which a freed block is returned to the system. Every glibc version accepts this value."""


def memory_limit_bytes(root: Path = _ROOT) -> Choice[int]:
    """Return the main memory available to this process in bytes: the smaller of its control group limit and the
    physical memory.
    """
    physical = _sizes(root / "proc/meminfo").get("MemTotal") or int(psutil.virtual_memory().total)
    limit = container_limits.memory_limit(root)
    if limit is not None and limit < physical:
        return Choice(limit, "control group limit")
    return Choice(physical, "physical memory")


def free_memory_bytes(root: Path = _ROOT) -> int:
    """Return the bytes of main memory that this process can still allocate, limited by its control group."""
    available = _sizes(root / "proc/meminfo").get("MemAvailable") or int(psutil.virtual_memory().available)
    in_group = container_limits.memory_free(root)
    return available if in_group is None else min(available, in_group)


def swap_bytes(root: Path = _ROOT) -> tuple[int, int]:
    """Return the used and the total bytes of swap space."""
    sizes = _sizes(root / "proc/meminfo")
    if "SwapTotal" in sizes and "SwapFree" in sizes:
        return sizes["SwapTotal"] - sizes["SwapFree"], sizes["SwapTotal"]
    swap = psutil.swap_memory()
    return int(swap.used), int(swap.total)


def resident_bytes(process: int | None = None) -> int:
    """Return the resident memory of a process (by default this one) in bytes, or 0 if it has exited."""
    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return 0


def peak_resident_bytes(root: Path = _ROOT) -> int:
    """Return the peak resident memory of this process in bytes."""
    peak = _sizes(root / "proc/self/status").get("VmHWM")
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows, hence not above

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Reset the peak of :func:`peak_resident_bytes` to the current size, if the system supports it (Linux)."""
    with contextlib.suppress(OSError):
        (_ROOT / "proc/self/clear_refs").write_text("5", encoding="ascii")


class PeakMemory:
    """Context manager that measures the peak resident memory during a block.

    Attributes:
        bytes: Peak in bytes. It is exact if the block set a new peak of the process. Otherwise the system does not
            report it, and it is the larger of the resident sizes at entry and exit.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        self._peak = peak_resident_bytes()
        self._resident = resident_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        peak = peak_resident_bytes()
        resident = resident_bytes()
        self.bytes = max(peak if peak > self._peak else 0, resident, self._resident)


def release_free_memory() -> None:
    """Collect garbage and return unused memory of this process to the system, if the allocator supports it.

    Reading a large file or a model leaves holes that later tensors seldom fit into. With glibc they would stay resident
    for the rest of the run.
    """
    gc.collect()
    trim_memory()


# Called after unused memory is returned to the system, so that a simulated allocator can do the same.
trim_listeners: list[Callable[[], None]] = []


def trim_memory() -> None:
    """Return unused memory of this process to the system without collecting garbage."""
    library = _allocator()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    for listener in trim_listeners:
        listener()


def retain_freed_memory() -> None:
    """Configure glibc's allocator to retain freed memory for later allocations.

    By default, glibc returns large blocks to the system and receives them back zeroed page by page, which costs up to a
    tenth of a short step. :func:`release_free_memory` still returns everything. Blocks above :data:`MAX_RETAINED_BYTES`
    are not retained: smaller tensors fragment their hole, so the next vocabulary-sized gradient would not fit, and the
    peak would grow by its size. All threads share one heap, because memory freed in one heap cannot be used by threads
    of another.

    Has no effect with another allocator, or if the user configures glibc's in the environment.
    """
    options = {_M_TRIM_THRESHOLD: 2**30, _M_MMAP_THRESHOLD: MAX_RETAINED_BYTES, _M_ARENA_MAX: 1}
    user_variables = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    _set_allocator(options, unless=user_variables)


def return_large_blocks() -> None:
    """Configure glibc's allocator to return blocks of at least 1 MiB to the system as soon as they are freed.

    Use it for weights that are loaded and freed block by block between tensors that stay allocated. In one heap, the
    holes between them would add up to a large part of the model. The free end of the heap is trimmed too, because glibc
    would otherwise place large blocks in it. Has no effect with another allocator.
    """
    if _set_allocator({_M_TRIM_THRESHOLD: 2**20, _M_MMAP_THRESHOLD: 2**20}):
        trim_memory()


def share_heaps() -> None:
    """Limit glibc's allocator to two heaps, shared by all threads that start from now on.

    By default there are eight per core, and memory freed in one cannot be used by threads of another: short requests
    would leave tens of megabytes in each. Has no effect with another allocator, or if the user configures glibc's in
    the environment.
    """
    _set_allocator({_M_ARENA_MAX: 2}, unless=("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"))


def _allocator() -> ctypes.CDLL | None:
    """Return the C library if its allocator may be glibc's, else None."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _set_allocator(options: dict[int, int], unless: tuple[str, ...] = ()) -> bool:
    """Set options of glibc's allocator, unless one of the environment variables in ``unless`` is set.

    Returns:
        True if the options were set.
    """
    library = _allocator()
    if library is None or not hasattr(library, "mallopt") or any(name in os.environ for name in unless):
        return False
    for option, value in options.items():
        library.mallopt(option, value)
    return True


def _sizes(path: Path) -> dict[str, int]:
    """Return the sizes in a kernel file by name. Values in kB are converted to bytes."""
    sizes = {}
    for line in container_limits.read_lines(path):
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[key] = int(value.split()[0]) * 1024
    return sizes
