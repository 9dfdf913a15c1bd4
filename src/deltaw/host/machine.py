"""What this machine can do, and what is therefore chosen: device, precision, threads, memory limit.

Each choice comes with the reason for it, so that a run can say both. A value that the user asked for is
kept when the machine can do it at all, and refused with a hint when it cannot.

It knows nothing of models or runs. The root of the file system is a parameter, so that a test can describe
a machine in a folder.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from deltaw.errors import UserError, did_you_mean
from deltaw.host import cgroup

T = TypeVar("T")

# What a model is loaded as. Of int8 the blocks' weights become bytes afterwards; all else stays bf16.
DTYPES: Mapping[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.bfloat16,
}

# Multiplying bf16 without one of these is emulated: 44 to 499 times slower than fp32 has been measured.
_X86_BF16_FLAGS = ("amx_bf16", "avx512_bf16")
_ROOT = Path("/")
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value that was settled, and why in a few words."""

    value: T
    why: str

    def __str__(self) -> str:
        return f"{self.value} ({self.why})"


def choose_device(asked: str = "auto") -> Choice[str]:
    """The device to compute on: ``cuda``, ``cuda:N``, ``mps`` or ``cpu``.

    ``auto`` takes a CUDA device where there is one, else the processor; ``mps`` only when asked for.

    Raises:
        UserError: the device asked for is unknown or is not there.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            return Choice("cuda", torch.cuda.get_device_name(0))
        return Choice("cpu", "no CUDA device is there")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        known = ("auto", "cpu", "cuda", "mps")
        raise UserError(f"'{asked}' is no device", where="device", hint=did_you_mean(asked, known))
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "a CUDA device is asked for, and torch sees none",
            where="device",
            hint="install the CUDA build of torch and check the driver, or use device: cpu",
        )
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UserError(
            f"device {asked} is asked for, and there are {torch.cuda.device_count()} CUDA devices",
            where="device",
            hint="devices are counted from 0",
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "the mps device is asked for, and this torch has none", where="device", hint="use device: cpu"
        )
    return Choice(asked, "as asked")


def choose_precision(device: str, asked: str = "auto", root: Path = _ROOT) -> Choice[str]:
    """The type of the frozen weights: a key of :data:`DTYPES`.

    ``auto`` is bf16 where the device multiplies bf16 natively and fp32 elsewhere: on x86 processors with
    ``amx_bf16`` or ``avx512_bf16``, ARM processors with ``bf16``, CUDA from compute capability 8.0.

    Raises:
        UserError: an unknown precision, fp16 on a processor, or int8 anywhere else.
    """
    if asked not in ("auto", *DTYPES):
        hint = did_you_mean(asked, ("auto", *DTYPES))
        raise UserError(f"'{asked}' is no precision", where="precision", hint=hint)
    kind = torch.device(device).type
    if asked == "fp16" and kind == "cpu":
        raise UserError(
            "fp16 is not for processors: they multiply it slowly and it overflows where bf16 does not",
            where="precision",
            hint="use precision: auto, bf16 or fp32",
        )
    if asked == "int8" and kind != "cpu":
        raise UserError(
            f"int8 is for processors, and the device is {kind}",
            where="precision",
            hint="use precision: auto or bf16",
        )
    reason = _native_bf16(device, root)
    if asked == "int8" and reason is None:
        return Choice("int8", f"as asked, though {_lacks_bf16(kind)}: expect it to be slow")
    if asked == "bf16" and reason is None:
        return Choice("bf16", f"as asked, though {_lacks_bf16(kind)}: expect it to be slow")
    if asked != "auto":
        return Choice(asked, "as asked")
    if reason is None:
        return Choice("fp32", _lacks_bf16(kind))
    return Choice("bf16", reason)


def choose_threads(asked: str | int = "auto", root: Path = _ROOT) -> Choice[int]:
    """How many threads to compute with: what the process may use, not what the machine has.

    ``auto`` is ``OMP_NUM_THREADS`` where that is set, else the least of the processors that the process may
    run on, their physical cores, and the quota of its control groups (rounded down, at least one).

    Raises:
        UserError: not a number above zero.
    """
    if asked != "auto":
        if not str(asked).isdigit() or int(asked) < 1:
            raise UserError(
                f"'{asked}' is no number of threads", where="threads", hint="use auto or a number from 1"
            )
        return Choice(int(asked), "as asked")
    set_by_user = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if set_by_user.isdigit() and int(set_by_user) > 0:
        return Choice(int(set_by_user), "OMP_NUM_THREADS")
    usable = _usable_processors()
    bounds = [(len(usable), "processors this process may use"), (_physical_cores(usable, root), "cores")]
    quota = cgroup.processor_quota(root)
    if quota is not None:
        bounds.append((max(1, int(quota)), f"control group quota of {quota:g} processors"))
    # Of equal bounds the later is named: it says more about why there are not more threads.
    count, why = min(reversed(bounds), key=lambda bound: bound[0])
    return Choice(count, f"physical {why}" if why == "cores" else why)


def memory_limit_bytes(root: Path = _ROOT) -> Choice[int]:
    """The bytes of main memory that this process may hold: control group or physical, the smaller."""
    physical = _physical_memory(root)
    limit = cgroup.memory_limit(root)
    if limit is not None and limit < physical:
        return Choice(limit, "control group limit")
    return Choice(physical, "physical memory")


def resident_bytes() -> int:
    """The bytes of main memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes(root: Path = _ROOT) -> int:
    """The most bytes of main memory that this process has held so far."""
    status = _read(root / "proc/self/status")
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows, hence not above

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_free_memory() -> None:
    """Give the memory that this process holds but does not use back to the system, where its allocator can.

    Reading a large file or a model leaves holes that later tensors seldom fit: with glibc they would stay
    resident for the whole run.
    """
    gc.collect()
    trim_memory()


def trim_memory() -> None:
    """The same without a look for unreachable objects: holes left by tensors of many sizes go back."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


def keep_freed_memory() -> None:
    """Let this process's allocator keep what is freed for what comes next, where it is glibc's.

    As it comes, glibc gives large blocks back to the system and gets them again, cleared page by page: up to
    a tenth of a short step. The peak does not change. :func:`release_free_memory` still gives all back.
    Whoever has set the allocator through the environment keeps those settings.
    """
    told = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if sys.platform != "linux" or any(name in os.environ for name in told):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            library.mallopt(parameter, 2**30)


def _native_bf16(device: str, root: Path) -> str | None:
    """Why bf16 is fast on ``device``; None where it is not."""
    kind = torch.device(device).type
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else None
    if kind != "cpu":
        return None
    if sys.platform == "darwin" and root == _ROOT:
        return "the processor has FEAT_BF16" if _mac_has_bf16() else None
    flags = _processor_flags(root)
    for flag in (*_X86_BF16_FLAGS, "bf16"):
        if flag in flags:
            return f"the processor has {flag}"
    return None


def _lacks_bf16(kind: str) -> str:
    if kind == "cuda":
        return "this device has no native bf16 (compute capability below 8.0)"
    if kind == "cpu":
        return "this processor does not multiply bf16 natively"
    return f"bf16 is not taken for granted on {kind}"


def _processor_flags(root: Path) -> set[str]:
    """The feature words of the first processor in ``/proc/cpuinfo`` (``flags``, on ARM ``Features``)."""
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _mac_has_bf16() -> bool:
    if platform.machine() != "arm64":
        return False
    command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.stdout.strip() == "1"


def _usable_processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _physical_cores(usable: set[int], root: Path) -> int:
    """The physical cores behind the processors in ``usable``: hyperthreads of one core count once."""
    cores = set()
    for number in usable:
        topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.add(siblings.strip() or f"processor {number}")
    if any(not core.startswith("processor ") for core in cores) or root != _ROOT:
        return len(cores)
    return min(len(usable), psutil.cpu_count(logical=False) or len(usable))


def _physical_memory(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return int(psutil.virtual_memory().total)


def _read(path: Path) -> str:
    """A small kernel file's text; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
