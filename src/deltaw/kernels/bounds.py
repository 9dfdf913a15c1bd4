"""What is checked before a kernel reads or writes: the same error with and without the extension.

Knows integers and shapes; not what they mean to a model.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def check_targets(targets: Tensor, classes: int) -> None:
    """Refuse class indices outside of ``0 … classes - 1`` before anything is written.

    Raises:
        IndexError: one of them is; it is named. TypeError: they are not int64.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}, not {torch.int64}")
    if not targets.numel():
        return
    for target in (int(targets.min()), int(targets.max())):
        if not 0 <= target < classes:
            raise IndexError(f"target {target} is out of bounds for {classes} classes")


def check_places(places: Tensor, length: int) -> None:
    """Refuse places that do not ascend, or lie outside of a row of ``length`` tokens.

    Raises:
        IndexError: one lies outside; it is named. ValueError: they are no list, or do not ascend.
        TypeError: they are not int64.
    """
    if places.dtype != torch.int64:
        raise TypeError(f"picked places are {places.dtype}, not {torch.int64}")
    if places.dim() != 1:
        raise ValueError(f"picked places are {tuple(places.shape)}, not a list")
    listed = places.tolist()
    for place in (min(listed, default=0), max(listed, default=0)):
        if listed and not 0 <= place < length:
            raise IndexError(f"picked place {place} is out of bounds for a row of {length} tokens")
    if any(later <= place for place, later in pairwise(listed)):
        raise ValueError("picked places must ascend, each only once")


def check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    """Refuse what is no contiguous vector of fp32 numbers of this size; None is nothing to check.

    Raises:
        ValueError: it is not.
    """
    check_shape(name, tensor, size)
    if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous and in fp32")


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Refuse a tensor of another shape; None is nothing to check.

    Raises:
        ValueError: with both shapes.
    """
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
