"""Memory of CUDA devices, on this machine or assumed for a plan. Functions import torch, which is slow."""

from __future__ import annotations

from importlib.util import find_spec

# Approximate size of a CUDA context with torch's kernels and libraries. Not measured.
CONTEXT_BYTES = 500 << 20
# Default size of a cuBLAS workspace from compute capability 9.0 on, and below (2 × 4,096 KiB + 8 × 16 KiB).
WORKSPACE_BYTES = (32 << 20, 8320 << 10)


def card_memory(device: str) -> tuple[int, int] | None:
    """Return the free and the total bytes of a CUDA device, or None if this machine has none."""
    import torch

    return torch.cuda.mem_get_info(device) if torch.cuda.is_available() else None


def context_bytes() -> int:
    """Return the size of a CUDA context, or 0 for a simulated device in torch's CPU build."""
    import torch

    return 0 if torch.version.cuda is None and torch.cuda.is_available() else CONTEXT_BYTES


def workspace_bytes(device: str) -> int:
    """Return the bytes of cuBLAS workspaces: one for the forward and one for the backward thread."""
    import torch

    if not context_bytes():
        return 0
    is_new = not torch.cuda.is_available() or torch.cuda.get_device_capability(device)[0] >= 9
    return 2 * WORKSPACE_BYTES[0 if is_new else 1]


def compiles_kernels() -> bool:
    """Return True if torch can compile kernels for CUDA. Assumed if this machine has no CUDA device."""
    import torch

    return not torch.cuda.is_available() or (torch.version.cuda is not None and find_spec("triton") is not None)
