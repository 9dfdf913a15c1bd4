"""Argument checks of kernels. They raise the same errors with and without the compiled library."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def check_targets(targets: Tensor, classes: int) -> None:
    """Check that class indices are in ``0 … classes - 1``.

    Raises:
        IndexError: if a target is out of bounds.
        TypeError: if the targets are not int64.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}, not {torch.int64}")
    if not targets.numel():
        return
    for target in (int(targets.min()), int(targets.max())):
        if not 0 <= target < classes:
            raise IndexError(f"target {target} is out of bounds for {classes} classes")


def check_positions(positions: Tensor, length: int) -> None:
    """Check that ``positions`` are strictly ascending within a packed row of ``length`` tokens.

    Raises:
        IndexError: if a position is out of bounds.
        ValueError: if the tensor is not one-dimensional or not strictly ascending.
        TypeError: if the positions are not int64.
    """
    if positions.dtype != torch.int64:
        raise TypeError(f"selected positions are {positions.dtype}, not {torch.int64}")
    if positions.dim() != 1:
        raise ValueError(f"selected positions are {tuple(positions.shape)}, not a one-dimensional tensor")
    listed = positions.tolist()
    for position in (min(listed, default=0), max(listed, default=0)):
        if listed and not 0 <= position < length:
            raise IndexError(f"selected position {position} is out of bounds for {length} tokens")
    if any(later <= position for position, later in pairwise(listed)):
        raise ValueError("selected positions must ascend without duplicates")


def check_vector(name: str, tensor: Tensor | None, size: int) -> None:
    """Check that a tensor is a contiguous fp32 vector of ``size`` elements. None is accepted.

    Raises:
        ValueError: if it is not.
    """
    check_shape(name, tensor, size)
    if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
        raise ValueError(f"{name} must be contiguous and in fp32")


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Check the shape of a tensor. None is accepted.

    Raises:
        ValueError: if the shape differs. The message contains both shapes.
    """
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
