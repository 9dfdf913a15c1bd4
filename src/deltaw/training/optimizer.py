"""AdamW over the trained parameters, and the learning rate at each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

SCHEDULES = ("constant", "linear", "cosine")


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in torch's fused form, which updates every tensor in one call."""
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas, fused=True)


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: ``warmup`` itself, or that share of ``total`` where it is below 1."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate that step ``step`` (from 0) of ``total`` uses.

    It rises linearly over ``warmup`` steps, none of which is zero, and then stays (``constant``), falls
    linearly, or falls along half a cosine, towards zero after the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
