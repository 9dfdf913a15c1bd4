"""Choose the device, the precision of the frozen weights, and the number of threads for a machine's processors.

Each :class:`Choice` contains its reason, so that a run can print both. Values that the user sets are used if the
machine supports them, and rejected with a hint otherwise.

Torch is imported only by the functions that query it. The root of the file system is a parameter, so that tests can
describe a machine in a folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

import psutil

from deltaw.errors import UserError, did_you_mean
from deltaw.machine.container_limits import processor_quota

if TYPE_CHECKING:
    import torch


def native_bf16(device: str) -> str | None:
    """Return the reason why bf16 is fast on a GPU, or None if it is not."""
    if device.partition(":")[0] != "cuda":
        return None
    import torch

    if not torch.cuda.is_available():
        return "assumed for a card that is not on this machine"
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
    if any(not core.startswith("processor ") for core in cores) or root != Path("/"):
        return len(cores)
    return min(len(usable), psutil.cpu_count(logical=False) or len(usable))


T = TypeVar("T")

UNTESTED_GPU = "deltaw has not been tested on a GPU, and its speed there has not been measured"

# Valid values of ``precision``. int8 and nf4 quantize the linear layers of the blocks after loading. gguf leaves
# weights in the blocks of the model's GGUF file. All other parameters are in 16 bits with these three.
PRECISIONS = ("bf16", "fp16", "fp32", "int8", "gguf", "nf4")
QUANTIZED = ("int8", "gguf", "nf4")
# BF16_RATE_SHARE: ``auto`` chooses bf16 if its products reach this share of the rate of fp32.
# SLOW_RATE_SHARE: a requested precision below this share of the best rate is reported as slow.
BF16_RATE_SHARE = 0.85
SLOW_RATE_SHARE = 0.6
_ROOT = Path("/")


@dataclass(frozen=True)
class Choice(Generic[T]):
    """A value that was chosen, with a short reason."""

    value: T
    why: str

    def __str__(self) -> str:
        return f"{self.value} ({self.why})"


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype that a model is loaded in for one of :data:`PRECISIONS`."""
    import torch

    return {"fp16": torch.float16, "fp32": torch.float32}.get(precision, torch.bfloat16)


def loading_precision(device: str, precision: str) -> str:
    """Return the precision to load a model in before its weights are quantized: fp16 on a CUDA device without bf16."""
    is_old_gpu = device.partition(":")[0] == "cuda" and native_bf16(device) is None
    return "fp16" if precision in QUANTIZED and is_old_gpu else precision


def require_bitsandbytes(subject: str) -> None:
    """Raise a UserError if bitsandbytes is missing, or accelerate, which transformers needs to load its layers."""
    if missing := [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{subject} needs {', '.join(missing)}", hint='pip install "deltaw[cuda]"')
    # bitsandbytes warns in each int8 product that inputs are in bf16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


_ASSUMES_CARDS = ContextVar("assumes_cards", default=False)


@contextlib.contextmanager
def assumed_cards() -> Iterator[None]:
    """Context in which ``device: cuda`` is valid without a CUDA device, to plan a run on another machine."""
    token = _ASSUMES_CARDS.set(True)
    try:
        yield
    finally:
        _ASSUMES_CARDS.reset(token)


def choose_device(requested: str = "auto") -> Choice[str]:
    """Return the device to compute on: ``cuda``, ``cuda:N``, ``mps`` or ``cpu``.

    ``auto`` chooses CUDA if it is available, else the CPU. It never chooses ``mps``.

    Raises:
        UserError: if the requested device is unknown or unavailable.
    """
    import torch

    if requested == "auto":
        if torch.cuda.is_available():
            return Choice("cuda", torch.cuda.get_device_name(0))
        return Choice("cpu", "no CUDA device was found")
    kind, _, index = requested.partition(":")
    if re.fullmatch("(cpu|cuda|mps)(:(0|[1-9][0-9]*))?", requested) is None:
        hint = did_you_mean(requested, ("auto", "cpu", "cuda", "mps"))
        raise UserError(f"'{requested}' is not a device", location="device", hint=hint)
    if kind == "cuda" and not torch.cuda.is_available():
        if _ASSUMES_CARDS.get():
            return Choice(requested, "not on this machine")
        hint = "install the CUDA build of torch and check the driver, or use device: cpu"
        raise UserError("no CUDA device is available to torch", location="device", hint=hint)
    if kind == "cuda" and index and int(index) >= (count := torch.cuda.device_count()):
        message = f"device {requested} does not exist: torch sees {count} CUDA devices"
        raise UserError(message, location="device", hint="devices are counted from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("the mps device is not available in this torch", location="device", hint="use device: cpu")
    return Choice(requested, "as requested")


def choose_precision(device: str, requested: str = "auto", rates: Mapping[str, float] | None = None) -> Choice[str]:
    """Choose the precision of the frozen weights, one of :data:`PRECISIONS`.

    On a CPU, ``auto`` chooses bf16, which halves the memory, if its products are about as fast as those of fp32
    weights, and fp32 otherwise. On CUDA it chooses bf16 from compute capability 8.0 on, and fp16 below.

    Args:
        device: Device to compute on.
        requested: ``auto`` or a precision.
        rates: GFLOP/s of products by the precision of their weights, or None to measure this machine.

    Raises:
        UserError: if the precision is unknown, fp16 on a CPU, or quantized on a device that does not support it.
    """
    if requested not in ("auto", *PRECISIONS):
        hint = did_you_mean(requested, ("auto", *PRECISIONS))
        raise UserError(f"'{requested}' is not a precision", location="precision", hint=hint)
    kind = device.partition(":")[0]
    if requested == "fp16" and kind == "cpu":
        message = "fp16 is not for processors: it is slow on them, and it overflows at values that bf16 can represent"
        raise UserError(message, location="precision", hint="use precision: auto, bf16 or fp32")
    if requested in QUANTIZED and kind != "cpu":
        if requested == "gguf" or kind != "cuda":
            message = f"{requested} is not available on the device {kind}"
            raise UserError(message, location="precision", hint="use precision: auto, or nf4 on CUDA")
        if not _ASSUMES_CARDS.get():
            require_bitsandbytes(f"precision {requested} on CUDA")
        return Choice(requested, "as requested, with bitsandbytes")
    if requested in ("fp32", "gguf", "nf4"):
        return Choice(requested, "as requested")
    if kind != "cpu":
        return _accelerator_precision(device, requested)
    if rates is None:
        from deltaw.machine.kernel_choice import choose_kernels
        from deltaw.machine.product_rates import GENERIC

        measured = choose_kernels(GENERIC, choose_threads().value)
        rates = {weight_type: measured.rate(weight_type) for weight_type in ("fp32", "bf16", "int8")}
    best = max(rates["fp32"], rates["bf16"])
    reason = f"bf16 products reach {rates['bf16']:.0f} GFLOP/s, fp32 {rates['fp32']:.0f}"
    if requested == "auto":
        return Choice("bf16" if rates["bf16"] >= BF16_RATE_SHARE * rates["fp32"] else "fp32", reason)
    if rates[requested] < SLOW_RATE_SHARE * best:
        slow = f"{requested} products reach {rates[requested]:.0f} GOP/s on this machine"
        return Choice(requested, f"as requested, but slow: {slow}, compared to {best:.0f} in another precision")
    return Choice(requested, "as requested")


def _accelerator_precision(device: str, requested: str) -> Choice[str]:
    """Choose the precision on a GPU, for a requested precision other than fp32."""
    kind = device.partition(":")[0]
    reason = native_bf16(device)
    limitation = "this device has no native bf16 (compute capability below 8.0)"
    limitation = limitation if kind == "cuda" else f"bf16 support is unknown on {kind}"
    if requested == "bf16" and reason is None:
        return Choice("bf16", f"as requested, though {limitation}: expect it to be slow")
    if requested != "auto":
        return Choice(requested, "as requested")
    if reason is None:
        return Choice("fp16" if kind == "cuda" else "fp32", limitation)
    return Choice("bf16", reason)


def choose_threads(requested: str | int = "auto", root: Path = _ROOT) -> Choice[int]:
    """Choose the number of compute threads within the limits of the process.

    ``auto`` is ``OMP_NUM_THREADS`` if it is set. Otherwise it is the minimum of the processors that the process may run
    on, their physical cores, and the quota of its control groups (rounded down, at least 1).

    Raises:
        UserError: if the number is not a positive integer.
    """
    if requested != "auto":
        if not str(requested).isdigit() or int(requested) < 1:
            hint = "use auto or a number from 1"
            raise UserError(f"'{requested}' is not a number of threads", location="threads", hint=hint)
        return Choice(int(requested), "as requested")
    set_by_user = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if set_by_user.isdigit() and int(set_by_user) > 0:
        return Choice(int(set_by_user), "OMP_NUM_THREADS")
    usable = usable_processors()
    bounds = [(len(usable), "processors this process may use"), (physical_cores(usable, root), "cores")]
    quota = processor_quota(root)
    if quota is not None:
        bounds.append((max(1, int(quota)), f"control group quota of {quota:g} processors"))
    # If bounds are equal, the later one is reported because it is more specific.
    count, why = min(reversed(bounds), key=lambda bound: bound[0])
    return Choice(count, f"physical {why}" if why == "cores" else why)
