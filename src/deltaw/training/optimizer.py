"""AdamW over the trained parameters, and the learning rate at each step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

SCHEDULES = ("constant", "linear", "cosine")


def adamw(
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    *,
    factors: Sequence[float] | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in torch's fused form, which updates every tensor in one call.

    Args:
        factors: what each parameter's learning rate is multiplied with; parameters of one factor are a group.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, factor in zip(parameters, factors or [1.0] * len(parameters), strict=True):
        groups.setdefault(factor, []).append(parameter)
    given = [{"params": members, "factor": factor} for factor, members in groups.items()]
    return torch.optim.AdamW(given, lr=learning_rate, weight_decay=weight_decay, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The learning rate of the next step, times each group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]


@contextlib.contextmanager
def skipping(optimizer: torch.optim.Optimizer, unless: Tensor | None) -> Iterator[None]:
    """While open, a step of a fused optimizer changes nothing where ``unless``, a bool scalar on the
    parameters' device, is True. The device decides, so nobody waits for the answer.

    This is how torch's own scaler of gradients leaves steps out (``torch.amp.GradScaler``).
    """
    if unless is None:
        yield
        return
    optimizer.found_inf = unless.float()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a training.

    Attributes:
        name: of :data:`SCHEDULES`. learning_rate: its peak. total_steps: of the training.
        warmup: steps of linear warm-up, or a share of ``total_steps`` where below 1.
        planned: whether ``total_steps`` was planned on the way (:meth:`replanned`).
        since: the step that this was done at, after the warm-up; else 0. decayed: the share of the decay that
            was done by then.
    """

    name: str
    learning_rate: float
    total_steps: int
    warmup: float = 0.0
    planned: bool = False
    since: int = 0
    decayed: float = 0.0

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0)."""
        warm = warmup_steps(self.warmup, self.total_steps)
        if step < warm or self.since <= warm:
            return self.learning_rate * learning_rate_factor(step, self.total_steps, warm, self.name)
        return self.learning_rate * decay_factor(self._decayed(step, warm), self.name)

    def replanned(self, step: int, total_steps: int) -> Schedule:
        """The schedule of a training that is to end after ``total_steps`` instead, with ``step`` steps done.

        The rate goes on from where it is and reaches zero at the new end. During the warm-up, a share of it
        becomes that share of the new total, and no fewer steps than are done.
        """
        warm, later = warmup_steps(self.warmup, self.total_steps), self
        if step <= warm:
            warm = max(step, warmup_steps(self.warmup, total_steps))
        else:
            later = replace(self, since=step, decayed=self._decayed(step, warm))
        return replace(later, total_steps=total_steps, warmup=float(warm), planned=True)

    def _decayed(self, step: int, warm: int) -> float:
        """The share of the decay that is done at ``step``, after the warm-up."""
        begin, before = (self.since, self.decayed) if self.since > warm else (warm, 0.0)
        return before + (1.0 - before) * (step - begin) / max(1, self.total_steps - begin)


@dataclass(frozen=True)
class RisingRates(Schedule):
    """Rates that rise by the same factor from step to step, from ``lowest`` to ``learning_rate``."""

    lowest: float = 0.0

    def rate(self, step: int) -> float:
        share = step / max(1, self.total_steps - 1)
        return self.lowest * (self.learning_rate / self.lowest) ** share


def warmup_steps(warmup: float, total: int) -> int:
    """Steps of warm-up: ``warmup`` itself, or that share of ``total`` where it is below 1."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the peak learning rate that step ``step`` (from 0) of ``total`` uses.

    It rises linearly over ``warmup`` steps, none of which is zero, and then stays (``constant``), falls
    linearly, or falls along half a cosine, toward zero after the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return decay_factor((step - warmup) / max(1, total - warmup), schedule)


def decay_factor(done: float, schedule: str) -> float:
    """Share of the peak learning rate once the share ``done`` of the decay is behind."""
    if schedule == "constant":
        return 1.0
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def clipped_norm(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients together; they are scaled down to ``limit`` where it is larger."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On the processor looking is free, and saves going over all gradients; a device would be waited for.
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def count_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a run: every epoch ends with a step of the rows that are left."""
    per_epoch = math.ceil(rows / batch_size)
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * per_epoch))
