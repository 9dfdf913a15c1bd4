"""Losses of completions that the model wrote itself and that were rewarded: GRPO and its relatives.

With r = exp(log p − log p of when it was written) of a token, A the advantage of its completion, and m the loss mask,
a token's loss ℓ is

- ``grpo`` (arXiv 2402.03300, eq. 3), ``dr_grpo`` (2503.20783) and ``dapo`` (2503.14476, eq. 8):
  −min(r A, clip(r, 1 − ε, 1 + ε_high) A),
- ``cispo`` (2506.13585, eq. 4): −sg(min(r, ε_high)) A log p, with ε_high an absolute bound,
- ``gspo`` (2507.18071, eq. 5): as grpo, with r = exp of the mean over the completion of log p − log p then,
- ``rloo`` (2402.14740): as grpo, with r = exp of their sum.

They differ in what the sum of ℓ is divided by: the mean of a completion's own tokens, then of the completions (grpo,
gspo), the tokens of all completions of the step (dapo, cispo), completions times the most tokens that one may have
(dr_grpo), or completions alone (rloo). As TRL's GRPOTrainer and RLOOTrainer have them.

Knows no model, no reward and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.kernels.transfer import to_device
from deltaw.task_settings import RewardSettings
from deltaw.training.losses import RowLogProbs, Watched

# Added to the standard deviation of a group's rewards.
_SMALL = 1e-4
# What an importance weight is cut at, as truncated importance sampling does (arXiv 2503.01491 and TRL have 2).
_MOST_WEIGHT = 2.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout(Example):
    """A completion that the model wrote, with its prompt: the written tokens are its labels.

    Attributes:
        advantage: how much better it is than the others of its group.
        old_logprobs: fp32 (labels,), what the model gave each label before the first update on it, in nats; None
            where there is one update: then it is what the model gives now.
        base_logprobs: fp32 (labels,), what the base model gives each; None where the loss does not ask.
        engine_logprobs: fp32 (written,), what was computed when the tokens were drawn, an end token left out.
    """

    advantage: float = 1.0
    old_logprobs: np.ndarray | None = None
    base_logprobs: np.ndarray | None = None
    engine_logprobs: np.ndarray | None = None


def advantages(rewards: np.ndarray, loss: str, scale: bool = True) -> np.ndarray:
    """How much better each completion is than its group.

    Args:
        rewards: fp64 (groups, completions of a group).
        scale: divide by the standard deviation of the group's rewards, as GRPO does and Dr. GRPO does not.

    Returns:
        fp64, of the same shape: (R − mean) / (std + 1e-4), the standard deviation with Bessel's correction; of
        ``rloo`` R less the mean of the others.
    """
    count = rewards.shape[1]
    centered = rewards - rewards.mean(1, keepdims=True)
    if loss == "rloo":
        return centered * count / max(1, count - 1)
    if not scale or count < 2:
        return centered
    return centered / (rewards.std(1, ddof=1, keepdims=True) + _SMALL)


class PolicyMetrics(Watched):
    """Of tokens: how many were clipped, their divergence from the base, how many there are; and the same of tokens
    whose log-probabilities the engine gave: how far these are from the trainer's.

    Args:
        has_base: whether the divergence is known.

    Attributes:
        of_step: metrics of the step's completions that are known before the loss.
    """

    size = 5

    def __init__(self, has_base: bool = True) -> None:
        self._has_base = has_base
        self.of_step: dict[str, float] = {}

    def add(self, clipped: Tensor, divergence: Tensor, off: Tensor) -> None:
        """Add a microbatch: (E,) each; ``off`` is NaN where the engine gave nothing."""
        known = off[off.isfinite()]
        counts = (divergence.new_tensor(float(len(tokens))) for tokens in (clipped, known))
        self._plus([clipped.to(divergence.dtype).sum(), divergence.sum(), known.abs().sum(), *counts])

    def means(self) -> dict[str, float]:
        clipped, divergence, off, count, known = self.totals().tolist()
        found = dict(self.of_step)
        if count:
            found["clip_share"] = clipped / count
        if count and self._has_base:
            found["kl"] = divergence / count
        return found | ({"mismatch": off / known} if known else {})


class PolicyLoss:
    """The loss of completions that the settings name.

    Attributes:
        watched: shares and divergences of the tokens since it was last cleared.
    """

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings
        self._has_base = settings.beta > 0 and settings.loss != "rloo"  # there it is part of the reward
        self.watched = PolicyMetrics(self._has_base)

    def __call__(self, rows: RowLogProbs) -> Tensor:
        losses = self.of_tokens(rows)
        if self.settings.loss in ("grpo", "gspo", "rloo"):
            losses = losses / rows.counts().index_select(0, rows.row)
        return losses.sum()

    def units(self, rows: Sequence[Any]) -> int:
        """Completions, their tokens, or the tokens that they may have."""
        if self.settings.loss in ("dapo", "cispo"):
            return sum(row.label_count for row in rows)
        return len(rows) * (self.settings.most_written if self.settings.loss == "dr_grpo" else 1)

    def of_tokens(self, rows: RowLogProbs) -> Tensor:
        """(E,) the loss of each label of each completion, in the order of ``rows.index``."""
        settings = self.settings
        logprobs, given = rows.values.index_select(0, rows.index), [_rollout(row) for row in rows.rows]
        now = logprobs.detach()
        old = _joined([row.old_logprobs for row in given], given, now)
        moved = logprobs - torch.where(old.isnan(), now, old)
        advantage = torch.tensor([row.advantage for row in given], dtype=logprobs.dtype)
        advantage = to_device(advantage, logprobs.device).index_select(0, rows.row)
        log_ratios = moved
        if settings.loss in ("gspo", "rloo"):
            sums = moved.new_zeros(len(rows.rows)).index_add(0, rows.row, moved)
            log_ratios = (sums / rows.counts() if settings.loss == "gspo" else sums).index_select(0, rows.row)
        ratios = log_ratios.exp()
        if settings.loss == "cispo":
            losses = -ratios.clamp(max=settings.high).detach() * advantage * logprobs
            clipped = (ratios > settings.high) & (advantage > 0)
        else:
            bounded = ratios.clamp(1 - settings.epsilon, 1 + settings.high)
            losses = -torch.minimum(ratios * advantage, bounded * advantage)
            clipped = ((ratios < 1 - settings.epsilon) & (advantage < 0)) | (
                (ratios > 1 + settings.high) & (advantage > 0)
            )
        divergence = torch.zeros_like(now)
        if self._has_base:
            base = _joined([row.base_logprobs for row in given], given, now)
            behind = base - logprobs
            divergence = behind.exp() - behind - 1
            losses = losses + settings.beta * divergence * ratios
        engine = _joined([row.engine_logprobs for row in given], given, now)
        off = torch.where(old.isnan(), now, old) - engine
        self.watched.add(clipped, divergence.detach(), off)
        if settings.correct_above is not None:
            corrected = off.abs() > settings.correct_above  # NaN, where nothing was drawn, is not
            losses = losses * torch.where(corrected, off.exp().clamp(max=_MOST_WEIGHT), 1.0)
        return losses


def _rollout(row: Example) -> Rollout:
    assert isinstance(row, Rollout)
    return row


def _joined(each: Sequence[np.ndarray | None], rows: Sequence[Rollout], like: Tensor) -> Tensor:
    """(E,) values of the labels of all rows, one row after another; NaN where there are none."""
    parts = []
    for values, row in zip(each, rows, strict=True):
        part = np.full(row.label_count, np.nan)
        if values is not None:
            part[: len(values)] = values
        parts.append(part)
    return to_device(torch.from_numpy(np.concatenate(parts)).to(like.dtype), like.device)
