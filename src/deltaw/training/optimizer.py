"""AdamW optimizer and learning rate schedules."""

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
    factors: Sequence[float] | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """Create torch's fused AdamW (arXiv 1711.05101).

    Args:
        parameters: Parameters to optimize.
        learning_rate: Base learning rate.
        factors: Learning rate factor of each parameter. Parameters with equal factors form a parameter group.
        weight_decay: Weight decay coefficient.
        betas: Decay rates of the moments.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, factor in zip(parameters, factors or [1.0] * len(parameters), strict=True):
        groups.setdefault(factor, []).append(parameter)
    param_groups = [{"params": members, "factor": factor} for factor, members in groups.items()]
    return torch.optim.AdamW(param_groups, lr=learning_rate, weight_decay=weight_decay, betas=betas, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, multiplied by the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"]


@contextlib.contextmanager
def skip_update_if(optimizer: torch.optim.Optimizer, condition: Tensor | None) -> Iterator[None]:
    """Make a step of a fused optimizer a no-op if ``condition``, a bool scalar on the parameters' device, is True.

    The device evaluates the condition without synchronization, as in ``torch.amp.GradScaler``.
    """
    if condition is None:
        yield
        return
    optimizer.found_inf = condition.float()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Schedule:
    """Learning rate schedule.

    Attributes:
        name: One of :data:`SCHEDULES`.
        learning_rate: Peak learning rate.
        total_steps: Number of steps of the training.
        warmup: Number of linear warm-up steps, or a share of ``total_steps`` if below 1.
        planned: True if ``total_steps`` was changed during the training (:meth:`replanned`).
        since: Step after the warm-up at which it was changed, else 0.
        decayed: Share of the decay that was complete at that step.
    """

    name: str
    learning_rate: float
    total_steps: int
    warmup: float = 0.0
    planned: bool = False
    since: int = 0
    decayed: float = 0.0

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step`` (from 0)."""
        num_warmup = warmup_steps(self.warmup, self.total_steps)
        if step < num_warmup or self.since <= num_warmup:
            return self.learning_rate * learning_rate_factor(step, self.total_steps, num_warmup, self.name)
        return self.learning_rate * decay_factor(self._decayed(step, num_warmup), self.name)

    def replanned(self, step: int, total_steps: int) -> Schedule:
        """Return the schedule for a new number of total steps after ``step`` completed steps.

        The rate continues from its current value and reaches zero at the new end. An incomplete warm-up is scaled to
        the new total, but has at least ``step`` steps.
        """
        num_warmup = warmup_steps(self.warmup, self.total_steps)
        schedule = self
        if step <= num_warmup:
            num_warmup = max(step, warmup_steps(self.warmup, total_steps))
        else:
            schedule = replace(self, since=step, decayed=self._decayed(step, num_warmup))
        return replace(schedule, total_steps=total_steps, warmup=float(num_warmup), planned=True)

    def _decayed(self, step: int, num_warmup: int) -> float:
        """Return the share of the decay that is complete at ``step``."""
        start, initial = (self.since, self.decayed) if self.since > num_warmup else (num_warmup, 0.0)
        return initial + (1.0 - initial) * (step - start) / max(1, self.total_steps - start)


@dataclass(frozen=True)
class RisingRates(Schedule):
    """Learning rates that rise exponentially from ``lowest`` to ``learning_rate``."""

    lowest: float = 0.0

    def rate(self, step: int) -> float:
        share = step / max(1, self.total_steps - 1)
        return float(self.lowest * (self.learning_rate / self.lowest) ** share)


def warmup_steps(warmup: float, total: int) -> int:
    """Return the number of warm-up steps: ``warmup``, or that share of ``total`` if it is below 1."""
    return math.ceil(warmup * total) if warmup < 1 else int(warmup)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Return the factor of the peak learning rate at step ``step`` (from 0) of ``total``.

    It rises linearly over ``warmup`` steps, starting above zero. Then it is constant, or falls linearly or along half a
    cosine, and would reach zero after the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return decay_factor((step - warmup) / max(1, total - warmup), schedule)


def decay_factor(progress: float, schedule: str) -> float:
    """Return the factor of the peak learning rate when the share ``progress`` of the decay is complete."""
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def clipped_norm(parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
    """Return the norm of all gradients, and scale them down to ``limit`` if it is larger."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # On the CPU the comparison is free and avoids a pass over all gradients. On a device it would synchronize.
    if limit is not None and (norm.device.type != "cpu" or norm > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def count_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Return the number of optimizer steps of a run. The last step of an epoch has the remaining rows."""
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * math.ceil(rows / batch_size)))
