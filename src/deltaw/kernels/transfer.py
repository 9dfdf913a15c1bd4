"""Tensors from the processor's memory to a device without waiting for it.

A copy from ordinary memory to a CUDA device makes the host wait until all that was queued before is done.
From page-locked memory it is queued like any other work, and the host prepares the next batch meanwhile.

Knows tensors and devices; not what they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """``tensor`` on ``device``; queued and not waited for where the device is a CUDA device.

    The page-locked copy stays until the device has read it, which torch's allocator of such memory watches.
    """
    there = torch.device(device)
    if there.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(there)
    return tensor.pin_memory().to(there, non_blocking=True)
