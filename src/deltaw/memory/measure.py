"""The truth about a run's memory: what torch's allocator gave out.

It reads the allocator alone and shares nothing with the prediction, which is tested against it. Knows no
models and no training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages behind ``tensors``, each storage once."""
    storages = {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def peak_tensor_bytes(run: Callable[[], object], *, alive: Iterable[Tensor] = ()) -> int:
    """The most bytes that tensors on the processor took at one time while ``run`` ran.

    Counted are the allocations and releases that torch's profiler sees in the allocator, whatever made them:
    also buffers inside an operator that no tensor of the program ever held.

    Args:
        run: is called once. Keep it to a few steps: the profiler holds every event in memory.
        alive: tensors made before ``run`` that stay alive throughout; the profiler cannot see those. Memory
            that torch did not allocate itself (a mapped file, a NumPy array) counts only if it is named here.

    Returns:
        bytes, those of ``alive`` among them.
    """
    before = storage_bytes(alive)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.nbytes() and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    return before + peak
