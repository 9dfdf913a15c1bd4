"""Policy losses for rewarded completions: GRPO and its variants.

With r = exp(log p − log p_old) of a token, p_old its probability when it was generated, and A the advantage of its
completion, the loss ℓ of a token is

- ``grpo`` (arXiv 2402.03300, eq. 3), ``dr_grpo`` (2503.20783) and ``dapo`` (2503.14476, eq. 8):
  −min(r A, clip(r, 1 − ε, 1 + ε_high) A),
- ``cispo`` (2506.13585, eq. 4): −sg(min(r, ε_high)) A log p, with ε_high an absolute bound,
- ``gspo`` (2507.18071, eq. 5): as grpo, with r = exp of the mean of log p − log p_old over the completion,
- ``rloo`` (2402.14740): as grpo, with r = exp of the sum of log p − log p_old over the completion.

The divisor of the sum of ℓ differs. grpo and gspo average over the tokens of a completion, then over completions. dapo
and cispo divide by the number of tokens of the step. dr_grpo divides by the number of completions times the maximum
completion length, and rloo by the number of completions. TRL's GRPOTrainer and RLOOTrainer do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.kernels.layout import to_device
from deltaw.tasks.reward.settings import RewardSettings
from deltaw.training.losses import MetricAccumulator, RowLogProbs

# Added to the standard deviation of rewards in a group.
_STD_EPSILON = 1e-4
# Maximum weight of truncated importance sampling (2 in arXiv 2503.01491 and in TRL).
_MAX_IMPORTANCE_WEIGHT = 2.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout(Example):
    """A generated completion with its prompt. The generated tokens are the labels.

    Attributes:
        advantage: Advantage of the completion within its group.
        old_logprobs: fp32 (labels,) log-probabilities in nats before the first update on the rollout. None if there is
            a single update, for which they equal the current ones.
        base_logprobs: fp32 (labels,) log-probabilities of the base model, if the loss needs them.
        engine_logprobs: fp32 (generated tokens without terminator,) log-probabilities of the decoding engine.
    """

    advantage: float = 1.0
    old_logprobs: np.ndarray | None = None
    base_logprobs: np.ndarray | None = None
    engine_logprobs: np.ndarray | None = None


def advantages(rewards: np.ndarray, loss: str, scale: bool = True) -> np.ndarray:
    """Return the advantage of each completion within its group.

    Args:
        rewards: fp64 (groups, completions per group).
        scale: Divide by the standard deviation of the group's rewards, as GRPO does and Dr. GRPO does not.

    Returns:
        fp64 of the same shape: (R − mean) / (std + 1e-4), with Bessel's correction. For ``rloo``, R minus the mean of
        the other completions. Exactly 0 for a group with equal rewards.
    """
    count = rewards.shape[1]
    is_equal = np.ptp(rewards, axis=1, keepdims=True) == 0  # the mean can differ from them by rounding
    centered = np.where(is_equal, 0.0, rewards - rewards.mean(1, keepdims=True))
    if loss == "rloo":
        return centered * count / max(1, count - 1)
    if not scale or count < 2:
        return centered
    return centered / (rewards.std(1, ddof=1, keepdims=True) + _STD_EPSILON)


class PolicyMetrics(MetricAccumulator):
    """Clipped tokens, divergence from the base model, and mismatch between engine and trainer.

    Args:
        has_base: True if the divergence is computed.
    """

    size = 5

    def __init__(self, has_base: bool = True) -> None:
        self._has_base = has_base

    def add(self, clipped: Tensor, divergence: Tensor, mismatch: Tensor) -> None:
        """Add a microbatch.

        Args:
            clipped: (E,) True for clipped tokens.
            divergence: (E,) divergence from the base model.
            mismatch: (E,) log-probability of the trainer minus that of the engine, NaN without an engine value.
        """
        available = mismatch[mismatch.isfinite()]
        counts = (divergence.new_tensor(float(len(tokens))) for tokens in (clipped, available))
        self._plus([clipped.to(divergence.dtype).sum(), divergence.sum(), available.abs().sum(), *counts])

    def means(self) -> dict[str, float]:
        clipped, divergence, mismatch, count, num_available = self.totals().tolist()
        metrics = {}
        if count:
            metrics["clip_share"] = clipped / count
        if count and self._has_base:
            metrics["kl"] = divergence / count
        return metrics | ({"mismatch": mismatch / num_available} if num_available else {})


class PolicyLoss:
    """Policy loss of the settings.

    Attributes:
        accumulator: Metrics of the tokens since it was last cleared.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self._has_base = settings.beta > 0 and settings.loss != "rloo"  # for rloo the divergence is part of the reward
        self.accumulator = PolicyMetrics(self._has_base)

    def __call__(self, rows: RowLogProbs) -> Tensor:
        losses = self.of_tokens(rows)
        if self.settings.loss in ("grpo", "gspo", "rloo"):
            losses = losses / rows.counts().index_select(0, rows.row)
        return losses.sum()

    def units(self, rows: Sequence[Any]) -> int:
        """Return the divisor of the summed loss: completions, their tokens, or their maximum number of tokens."""
        if self.settings.loss in ("dapo", "cispo"):
            return sum(row.label_count for row in rows)
        return len(rows) * (self.settings.max_completion_tokens if self.settings.loss == "dr_grpo" else 1)

    def of_tokens(self, rows: RowLogProbs) -> Tensor:
        """Return (E,) the loss of each label of each completion, in the order of ``rows.index``."""
        settings = self.settings
        logprobs = rows.values.index_select(0, rows.index)
        rollouts = [_rollout(row) for row in rows.rows]
        current = logprobs.detach()
        old = _concatenate([row.old_logprobs for row in rollouts], rollouts, current)
        token_log_ratios = logprobs - torch.where(old.isnan(), current, old)
        advantage = torch.tensor([row.advantage for row in rollouts], dtype=logprobs.dtype)
        advantage = to_device(advantage, logprobs.device).index_select(0, rows.row)
        log_ratios = token_log_ratios
        if settings.loss in ("gspo", "rloo"):
            sums = token_log_ratios.new_zeros(len(rows.rows)).index_add(0, rows.row, token_log_ratios)
            log_ratios = (sums / rows.counts() if settings.loss == "gspo" else sums).index_select(0, rows.row)
        ratios = log_ratios.exp()
        if settings.loss == "cispo":
            losses = -ratios.clamp(max=settings.upper_epsilon).detach() * advantage * logprobs
            clipped = (ratios > settings.upper_epsilon) & (advantage > 0)
        else:
            bounded = ratios.clamp(1 - settings.epsilon, 1 + settings.upper_epsilon)
            losses = -torch.minimum(ratios * advantage, bounded * advantage)
            is_low = (ratios < 1 - settings.epsilon) & (advantage < 0)
            clipped = is_low | ((ratios > 1 + settings.upper_epsilon) & (advantage > 0))
        divergence = torch.zeros_like(current)
        if self._has_base:
            base = _concatenate([row.base_logprobs for row in rollouts], rollouts, current)
            base_log_ratios = base - logprobs
            divergence = base_log_ratios.exp() - base_log_ratios - 1
            losses = losses + settings.beta * divergence * ratios
        engine = _concatenate([row.engine_logprobs for row in rollouts], rollouts, current)
        mismatch = torch.where(old.isnan(), current, old) - engine
        self.accumulator.add(clipped, divergence.detach(), mismatch)
        if settings.correct_above is not None:
            corrected = mismatch.abs() > settings.correct_above  # False for NaN
            losses = losses * torch.where(corrected, mismatch.exp().clamp(max=_MAX_IMPORTANCE_WEIGHT), 1.0)
        return losses


def _rollout(row: Example) -> Rollout:
    assert isinstance(row, Rollout)
    return row


def _concatenate(row_values: Sequence[np.ndarray | None], rows: Sequence[Rollout], like: Tensor) -> Tensor:
    """Return (E,) the values of the labels of all rows, concatenated. Missing values are NaN."""
    parts = []
    for values, row in zip(row_values, rows, strict=True):
        part = np.full(row.label_count, np.nan)
        if values is not None:
            part[: len(values)] = values
        parts.append(part)
    return to_device(torch.from_numpy(np.concatenate(parts)).to(like.dtype), like.device)
