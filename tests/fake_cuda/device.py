"""The Python side of the fake device: the functions of ``torch._C`` that only CUDA builds have, and counters.

``install`` must run before torch is imported, and therefore before transformers and deltaw.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda.build import build_device, is_cpu_build

GIB = 2**30


@dataclass
class DeviceProperties:
    """Values of ``torch.cuda.get_device_properties``. Defaults are those of a typical card."""

    total_memory: int = 24 * GIB
    major: int = 8
    minor: int = 9
    name: str = "fake CUDA"
    multi_processor_count: int = 128
    warp_size: int = 32
    max_threads_per_block: int = 1024
    max_threads_per_multi_processor: int = 1536
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 48 * 1024
    shared_memory_per_block_optin: int = 99 * 1024
    shared_memory_per_multiprocessor: int = 100 * 1024
    L2_cache_size: int = 64 * 2**20
    is_integrated: int = 0
    gcnArchName: str = ""


@dataclass
class Activity:
    """Numbers of events on the device, by kind.

    Attributes:
        launches: Calls by operator. A real device may launch several kernels per call.
        synchronizations: Waits of the host by cause.
        copies: ``host_to_device``, ``device_to_host``, and ``pageable`` (from or to host memory that is not pinned).
    """

    launches: Counter[str] = field(default_factory=Counter)
    synchronizations: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)


properties = DeviceProperties()
is_installed = False


def install() -> None:
    """Make ``device="cuda"`` available in this process."""
    global is_installed
    if "torch" in sys.modules:
        raise RuntimeError("install the fake device before torch is imported")
    if not is_cpu_build():
        raise RuntimeError("the fake device requires torch's CPU build")
    ctypes.CDLL(str(build_device()), mode=ctypes.RTLD_GLOBAL)
    _define_c_functions()
    _define_module_attributes()
    is_installed = True


def configure(*, total_memory: int | None = None, capability: tuple[int, int] | None = None) -> None:
    """Change the memory or the compute capability of the device."""
    import torch

    if total_memory is not None:
        properties.total_memory = total_memory
        torch.ops.fake_cuda.set_total_memory(total_memory)
    if capability is not None:
        properties.major, properties.minor = capability


def disable_compiled_kernels() -> None:
    """Compute attention and row functions with torch's operators, because the device cannot run compiled kernels."""
    from deltaw.kernels import compiled, gpu_attention

    compiled.DEVICES = gpu_attention.DEVICES = ()


@contextmanager
def configured(**options: Any) -> Iterator[None]:
    """Context in which :func:`configure` applies."""
    before = {"total_memory": properties.total_memory, "capability": (properties.major, properties.minor)}
    configure(**options)
    try:
        yield
    finally:
        configure(**before)


def activity() -> Activity:
    """Return all activity since the process started."""
    import torch

    ops = torch.ops.fake_cuda
    return Activity(Counter(ops.launches()), Counter(ops.synchronizations()), Counter(ops.copies()))


@contextmanager
def recorded() -> Iterator[Activity]:
    """Context whose value contains the activity of the block, after the block."""
    before = activity()
    result = Activity()
    try:
        yield result
    finally:
        after = activity()
        for name in ("launches", "synchronizations", "copies"):
            setattr(result, name, getattr(after, name) - getattr(before, name))


def _define_c_functions() -> None:
    """Define the functions that ``torch.cuda`` calls, so that its own Python code runs unchanged."""
    import torch

    ops = torch.ops.fake_cuda
    initialized_by: list[int] = []  # process ids
    functions = {
        "init": lambda: initialized_by.append(os.getpid()),
        "isInBadFork": lambda: bool(initialized_by) and initialized_by[0] != os.getpid(),
        "getDeviceCount": lambda: 1,
        "getDevice": lambda: 0,
        "setDevice": lambda index: None,
        "exchangeDevice": lambda index: 0,
        "maybeExchangeDevice": lambda index: 0,
        "getArchFlags": lambda: f"sm_{properties.major}{properties.minor}",
        "synchronize": ops.synchronize,
        "emptyCache": ops.empty_cache,
        "memoryStats": lambda index: _memory_stats(),
        "resetPeakMemoryStats": lambda index: ops.reset_peaks(),
        "resetAccumulatedMemoryStats": lambda index: None,
        "getAllocatorBackend": lambda: "native",
        "set_sync_debug_mode": ops.set_sync_debug_mode,
        "get_sync_debug_mode": ops.sync_debug_mode,
        "getCurrentRawStream": lambda index: 0,
        "setStream": lambda **stream: None,
        "ipc_collect": lambda: None,
    }
    for name, function in functions.items():
        setattr(torch._C, f"_cuda_{name}", function)
    torch._C._has_cuda = True


def _define_module_attributes() -> None:
    """Replace attributes that ``torch.cuda`` set when it was imported without CUDA."""
    import torch

    class Stream(torch.Stream):
        """The only stream."""

        cuda_stream = 0

        def __new__(cls, device: object = None, priority: int = 0, **ids: int) -> Stream:
            return super().__new__(cls, device="cuda:0")

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
            return super().__new__(cls, device="cuda:0", enable_timing=enable_timing)

    def new_storage(cls: type, *args: Any, device: object = None, **options: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return torch._C.StorageBase.__new__(cls, *args, device=device, **options)
        return torch.empty(*args, dtype=torch.uint8, device=device).untyped_storage()

    torch.UntypedStorage.__new__ = new_storage  # type: ignore[assignment]
    cuda = torch.cuda
    for module in (cuda, cuda.streams):
        module.Stream = Stream  # type: ignore[misc, assignment]
        module.Event = Event  # type: ignore[misc, assignment]
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream()  # type: ignore[assignment]
    cuda._is_in_bad_fork = torch._C._cuda_isInBadFork
    cuda._exchange_device = torch._C._cuda_exchangeDevice
    cuda._maybe_exchange_device = torch._C._cuda_maybeExchangeDevice
    cuda._get_device_properties = lambda index: properties  # type: ignore[attr-defined]
    cuda.default_generators = (torch.ops.fake_cuda.default_generator(),)
    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda index: _free_and_total())  # type: ignore[assignment]


def _free_and_total() -> tuple[int, int]:
    import torch

    memory = torch.ops.fake_cuda.memory()
    return memory["total"] - memory["reserved"], memory["total"]


def _memory_stats() -> dict[str, Any]:
    import torch

    memory = torch.ops.fake_cuda.memory()
    stats: dict[str, Any] = {
        f"{kind}_bytes": {"all": {"current": memory[kind], "peak": memory[f"{kind}_peak"]}}
        for kind in ("allocated", "reserved")
    }
    return {**stats, "num_ooms": memory["ooms"], "num_alloc_retries": 0}
