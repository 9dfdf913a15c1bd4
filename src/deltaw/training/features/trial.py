"""Comparing two ways to run the same rows: a few of them, their loss and gradients, and whether they agree.

Knows objectives and batchers; not what differs between the two ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.sequences import lengths_of
from deltaw.training.microbatches import AnyBatcher, AnyObjective

TRIED_ROWS = 3


def few_rows(examples: Sequence[Any]) -> list[Any]:
    """A few rows of different lengths, none of them long."""
    ordered = np.argsort(lengths_of(examples), kind="stable").tolist()
    places = sorted({0, len(ordered) // 4, len(ordered) // 2})
    return [examples[ordered[place]] for place in places][:TRIED_ROWS]


def loss_and_gradients(
    objective: AnyObjective, batcher: AnyBatcher, few: Sequence[Any], trained: Sequence[nn.Parameter]
) -> list[Tensor | None]:
    """The sum of losses, and its gradient for each trained parameter, None where it has none."""
    total: list[Tensor | None] = [None] * (1 + len(trained))
    for batch in batcher.batches(few):
        loss = objective(batch)
        parts = [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]
        for n, part in enumerate(parts):
            before = total[n]
            total[n] = part if before is None or part is None else before + part
    return total


def near(expected: Sequence[Tensor | None], found: Sequence[Tensor | None], tolerance: float) -> bool:
    """Whether all together differ by no more than ``tolerance`` of their norm."""
    if [e is None for e in expected] != [f is None for f in found]:
        return False
    pairs = [
        (e.float(), f.float())
        for e, f in zip(expected, found, strict=True)
        if e is not None and f is not None
    ]
    if not pairs:
        return True
    difference = torch.stack([(e - f).square().sum() for e, f in pairs]).sum().sqrt()
    norm = torch.stack([e.square().sum() for e, _ in pairs]).sum().sqrt()
    return bool(difference <= tolerance * norm)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference of norms that rounding in this type may make."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 6e-2
