"""Bounds that are checked before a kernel reads or writes: the same error with and without the extension.

Knows integers; not what they mean to a model.
"""

from __future__ import annotations

from torch import Tensor


def check_targets(targets: Tensor, classes: int) -> None:
    """Refuse class indices outside of ``0 … classes - 1`` before anything is written.

    Raises:
        IndexError: one of them is; it is named.
    """
    if not targets.numel():
        return
    for target in (int(targets.min()), int(targets.max())):
        if not 0 <= target < classes:
            raise IndexError(f"target {target} is out of bounds for {classes} classes")
