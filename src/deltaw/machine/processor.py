"""Query the processor's name and cores, and whether a GPU multiplies bf16 natively.

Torch is imported only to query a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from deltaw.kernels.processor import processor_flags, processor_name

__all__ = ["native_bf16", "physical_cores", "processor_flags", "processor_name", "usable_processors"]

_ROOT = Path("/")


def native_bf16(device: str) -> str | None:
    """Return the reason why bf16 is fast on a GPU, or None if it is not."""
    if device.partition(":")[0] != "cuda":
        return None
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor}" if major >= 8 else None


def usable_processors() -> set[int]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    process = psutil.Process()
    # Windows has a separate affinity API, and macOS has no affinity.
    return set(process.cpu_affinity() if hasattr(process, "cpu_affinity") else range(os.cpu_count() or 1))


def physical_cores(usable: set[int], root: Path) -> int:
    """Return the number of physical cores of the ``usable`` processors. Hyperthreads of one core count once."""
    cores = set()
    for number in usable:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        files = [topology / name for name in ("core_cpus_list", "thread_siblings_list")]
        siblings = [file.read_text(encoding="ascii").strip() for file in files if file.is_file()]
        cores.add(siblings[0] if siblings else f"processor {number}")
    if any(not core.startswith("processor ") for core in cores) or root != _ROOT:
        return len(cores)
    return min(len(usable), psutil.cpu_count(logical=False) or len(usable))
