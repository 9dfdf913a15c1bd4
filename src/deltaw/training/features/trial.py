"""Comparing two ways to run the same rows: a few of them, their loss and gradients, and whether they agree.

Knows objectives and batchers; not what differs between the two ways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.sequences import lengths_of
from deltaw.training.microbatches import AnyBatcher, AnyObjective

TRIED_ROWS = 3
# Numbers of a gradient that are compared at a time.
_AT_ONCE = 1 << 20


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
    difference = norm = 0.0
    for e, f in zip(expected, found, strict=True):
        if e is None or f is None:
            continue
        # A part at a time: a gradient may be as large as the model's largest weight.
        for mine, other in zip(e.flatten().split(_AT_ONCE), f.flatten().split(_AT_ONCE), strict=True):
            difference += float((mine.float() - other.float()).square().sum())
            norm += float(mine.float().square().sum())
    return math.sqrt(difference) <= tolerance * math.sqrt(norm)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference of norms that rounding in this type may make."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 6e-2
