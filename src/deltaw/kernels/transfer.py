"""Asynchronous copies of tensors from CPU memory to a device.

A copy from pageable memory to a CUDA device blocks the host until all queued work is done. A copy from pinned memory is
queued like other work, so the host can prepare the next batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """Return ``tensor`` on ``device``. Copies from the CPU to a CUDA device are asynchronous.

    torch's pinned-memory allocator reuses the pinned buffer only after the device has read it.
    """
    target = torch.device(device)
    if target.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(target)
    return tensor.pin_memory().to(target, non_blocking=True)
