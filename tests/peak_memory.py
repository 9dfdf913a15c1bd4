"""Measure the memory that a program allocates through torch's CPU allocator.

The measurement shares no code with the prediction, so tests can compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the total bytes of the storages behind ``tensors``. Shared storages count once."""
    storages = {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def peak_tensor_bytes(run: Callable[[], object], *, alive: Iterable[Tensor] = ()) -> int:
    """Return the peak number of bytes that tensors on the CPU use while ``run`` runs.

    All allocations recorded by torch's profiler are counted, including temporary buffers inside operators.

    Args:
        run: Function that is called once. Limit it to a few steps, because the profiler stores every event in memory.
        alive: Tensors allocated before ``run`` that stay alive throughout. The profiler does not report them. Memory
            not allocated by torch (a mapped file, a NumPy array) is counted only if it is passed here.

    Returns:
        Peak in bytes, including ``alive``.
    """
    alive_bytes = storage_bytes(alive)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    current = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.nbytes() and event.device_type() == torch.autograd.DeviceType.CPU:
            current += event.nbytes()
            peak = max(peak, current)
    return alive_bytes + peak
