"""What is chosen for this machine: device, precision of the frozen weights, number of threads.

Each choice comes with its reason, so that a run can print both. A value that the user asked for is kept where
the machine can do it at all, and refused with a hint where it cannot.

Knows no models and no runs. Torch is imported by the functions that ask it something, so that a caller that
only needs the number of threads does not wait for it. The root of the file system is a parameter: a test
describes a machine in a folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Generic, TypeVar

from deltaw.errors import UserError, did_you_mean
from deltaw.machine.processor import native_bf16, physical_cores, usable_processors

if TYPE_CHECKING:
    import torch


# A container or a batch system limits a process through control groups; neither torch nor ``/proc/meminfo``
# sees that. A limit may sit on the process's own group or on any group above it, so the whole path up to the
# root is read and the tightest value holds. Versions 1 and 2, and both mounted side by side, are understood.

# Where the two versions are mounted, relative to the root: version 2 alone, and beside version 1.
_UNIFIED_MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
_CONTROLLER_MOUNT = "sys/fs/cgroup"


def processor_quota(root: Path = Path("/")) -> float | None:
    """The processors' worth of time that the process may use, or None where nothing limits it.

    Version 2 writes ``quota period`` in ``cpu.max``; version 1 has ``cpu.cfs_quota_us`` (−1: no limit) and
    ``cpu.cfs_period_us``. Both are in microseconds; the quotient is a number of processors.
    """
    quotas = []
    for folder in _group_folders(root, "cpu"):
        # Two numbers in one file, or one in each of two.
        unified = _words(folder / "cpu.max")
        apart = [*_words(folder / "cpu.cfs_quota_us")[:1], *_words(folder / "cpu.cfs_period_us")[:1]]
        for quota in (unified, apart):
            if len(quota) == 2 and all(word.isdigit() and int(word) > 0 for word in quota):
                quotas.append(int(quota[0]) / int(quota[1]))
    return min(quotas, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """The bytes that the process's groups may hold together, or None where nothing limits them.

    ``memory.high`` counts as a limit too: above it the kernel reclaims so hard that a run crawls. Version 1
    writes a number near 2⁶³ for "no limit"; comparing with the physical memory is the caller's part.
    """
    return min((limit for folder in _group_folders(root, "memory") for limit in _limits(folder)), default=None)


def memory_free(root: Path = Path("/")) -> int | None:
    """The bytes that the process's groups may still take, or None where nothing limits them.

    What the kernel holds of files and can drop at once counts as free.
    """
    free = []
    for folder in _group_folders(root, "memory"):
        limits = _limits(folder)
        used = _positive(folder / "memory.current") or _positive(folder / "memory.usage_in_bytes")
        if limits and used is not None:
            stat = dict(line.split()[:2] for line in lines_of(folder / "memory.stat") if " " in line)
            droppable = stat.get("total_inactive_file") or stat.get("inactive_file") or "0"
            free.append(max(0, min(limits) - used + int(droppable)))
    return min(free, default=None)


def _limits(folder: Path) -> list[int]:
    """The limits on the memory of a group."""
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    return [limit for name in names if (limit := _positive(folder / name))]


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's group and of every group above it, for one controller."""
    for line in lines_of(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts = [root / mount for mount in _UNIFIED_MOUNTS]
        elif controller in controllers.split(","):
            names = dict.fromkeys((controllers, controller))
            mounts = [root / _CONTROLLER_MOUNT / name for name in names]
        else:
            continue
        parts = PurePosixPath(group).parts[1:]
        if ".." in parts:  # the group lies outside this namespace; its mount shows what applies here
            parts = ()
        for mount in mounts:
            # Inside a container the path may be the host's: the folders that do not exist here are skipped.
            for depth in range(len(parts), -1, -1):
                folder = mount.joinpath(*parts[:depth])
                if folder.is_dir():
                    yield folder


def lines_of(path: Path) -> list[str]:
    """The lines of a small kernel file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    lines = lines_of(path)
    return lines[0].split() if lines else []


def _positive(path: Path) -> int | None:
    """A file's whole number if it is above zero; None for ``max``, −1 and files that are not there."""
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() and int(words[0]) > 0 else None


T = TypeVar("T")

# The names of precisions. With int8 and nf4, the blocks' linear layers are quantized after loading; with
# gguf, weights stay in the blocks of the model's GGUF file. All else is bf16 then.
PRECISIONS = ("bf16", "fp16", "fp32", "int8", "gguf", "nf4")
QUANTIZED = ("int8", "gguf", "nf4")
# Bf16 is taken where its products reach this share of the rate of fp32: it takes half the memory. A precision
# that was asked for is called slow where it reaches less than that share of another.
AS_FAST, SLOW = 0.85, 0.6
_ROOT = Path("/")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value that was settled, and why in a few words."""

    value: T
    why: str

    def __str__(self) -> str:
        return f"{self.value} ({self.why})"


def dtype_of(precision: str) -> torch.dtype:
    """The type that a model is loaded in for one of :data:`PRECISIONS`."""
    import torch

    types = {"fp16": torch.float16, "fp32": torch.float32}
    return types.get(precision, torch.bfloat16)


def choose_device(asked: str = "auto") -> Choice[str]:
    """The device to compute on: ``cuda``, ``cuda:N``, ``mps`` or ``cpu``.

    ``auto`` takes a CUDA device where there is one, else the processor; ``mps`` only when asked for.

    Raises:
        UserError: the device asked for is unknown or is not there.
    """
    import torch

    if asked == "auto":
        if torch.cuda.is_available():
            return Choice("cuda", torch.cuda.get_device_name(0))
        return Choice("cpu", "no CUDA device is there")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        hint = did_you_mean(asked, ("auto", "cpu", "cuda", "mps"))
        raise UserError(f"'{asked}' is not a device", where="device", hint=hint)
    if kind == "cuda" and not torch.cuda.is_available():
        hint = "install the CUDA build of torch and check the driver, or use device: cpu"
        raise UserError("a CUDA device is asked for, and torch sees none", where="device", hint=hint)
    if kind == "cuda" and index and int(index) >= (count := torch.cuda.device_count()):
        what = f"device {asked} is asked for, and there are {count} CUDA devices"
        raise UserError(what, where="device", hint="devices are counted from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("the mps device is asked for, and this torch has none", where="device", hint="use device: cpu")
    return Choice(asked, "as asked")


def choose_precision(device: str, asked: str = "auto", rates: Mapping[str, float] | None = None) -> Choice[str]:
    """The type of the frozen weights: a key of :data:`PRECISIONS`.

    ``auto`` on a processor is bf16, which takes half the memory, where the fastest way to compute products of
    bf16 weights is about as fast as that of fp32 weights, and fp32 elsewhere. On CUDA it is bf16 from compute
    capability 8.0 on.

    Args:
        rates: GFLOP/s of products by the precision of their weights; None measures this machine.

    Raises:
        UserError: an unknown precision, fp16 on a processor, or a quantized one anywhere else.
    """
    if asked not in ("auto", *PRECISIONS):
        hint = did_you_mean(asked, ("auto", *PRECISIONS))
        raise UserError(f"'{asked}' is not a precision", where="precision", hint=hint)
    kind = device.partition(":")[0]
    if asked == "fp16" and kind == "cpu":
        what = "fp16 is not for processors: they multiply it slowly and it overflows where bf16 does not"
        raise UserError(what, where="precision", hint="use precision: auto, bf16 or fp32")
    if asked in QUANTIZED and kind != "cpu":
        what = f"{asked} is for processors, and the device is {kind}"
        raise UserError(what, where="precision", hint="use precision: auto or bf16")
    if asked in ("fp32", "gguf", "nf4"):
        return Choice(asked, "as asked")
    if kind != "cpu":
        return _other_device_precision(device, asked)
    if rates is None:
        from deltaw.machine.kernel_choice import choose_kernels
        from deltaw.machine.product_rates import GENERIC

        measured = choose_kernels(GENERIC, choose_threads().value)
        rates = {stored: measured.rate(stored) for stored in ("fp32", "bf16", "int8")}
    best = max(rates["fp32"], rates["bf16"])
    shown = f"bf16 products reach {rates['bf16']:.0f} GFLOP/s, fp32 {rates['fp32']:.0f}"
    if asked == "auto":
        return Choice("bf16" if rates["bf16"] >= AS_FAST * rates["fp32"] else "fp32", shown)
    if rates[asked] < SLOW * best:
        slow = f"{asked} products reach {rates[asked]:.0f} G operations a second on this machine"
        return Choice(asked, f"as asked, though {slow}, and {best:.0f} in another precision: expect it to be slow")
    return Choice(asked, "as asked")


def _other_device_precision(device: str, asked: str) -> Choice[str]:
    """The precision on a device that is no processor, where ``asked`` is not fp32."""
    kind, reason = device.partition(":")[0], native_bf16(device)
    lacking = "this device has no native bf16 (compute capability below 8.0)"
    lacking = lacking if kind == "cuda" else f"bf16 is not taken for granted on {kind}"
    if asked == "bf16" and reason is None:
        return Choice("bf16", f"as asked, though {lacking}: expect it to be slow")
    if asked != "auto":
        return Choice(asked, "as asked")
    return Choice("fp32", lacking) if reason is None else Choice("bf16", reason)


def choose_threads(asked: str | int = "auto", root: Path = _ROOT) -> Choice[int]:
    """How many threads to compute with: what the process may use, not what the machine has.

    ``auto`` is ``OMP_NUM_THREADS`` where that is set, else the least of the processors that the process may
    run on, their physical cores, and the quota of its control groups (rounded down, at least one).

    Raises:
        UserError: not a number above zero.
    """
    if asked != "auto":
        if not str(asked).isdigit() or int(asked) < 1:
            hint = "use auto or a number from 1"
            raise UserError(f"'{asked}' is not a number of threads", where="threads", hint=hint)
        return Choice(int(asked), "as asked")
    set_by_user = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if set_by_user.isdigit() and int(set_by_user) > 0:
        return Choice(int(set_by_user), "OMP_NUM_THREADS")
    usable = usable_processors()
    bounds = [(len(usable), "processors this process may use"), (physical_cores(usable, root), "cores")]
    quota = processor_quota(root)
    if quota is not None:
        bounds.append((max(1, int(quota)), f"control group quota of {quota:g} processors"))
    # Of equal bounds the later is named: it says more about why there are not more threads.
    count, why = min(reversed(bounds), key=lambda bound: bound[0])
    return Choice(count, f"physical {why}" if why == "cores" else why)
