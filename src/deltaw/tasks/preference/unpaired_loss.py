"""KTO (arXiv 2402.01306, eqs. 7 and 8): a loss of single desired or undesired answers with a reference model.

Let r = s − s° be the difference of an answer's log-probabilities under model and reference model. Let z be the mean
of r over prompts with answers of other rows, at least 0 and constant. It estimates the divergence from the reference
model. The loss is w (1 − σ(β (r − z))) for desired answers and w (1 − σ(β (z − r))) for undesired ones, as in the
KTOTrainer of TRL. z is shared by all rows of an optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.tasks.preference.losses import reference_sums
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.training.losses import MetricAccumulator, RowLogProbs, detach_wide


@dataclass(frozen=True)
class AnswerLosses:
    """Losses and rewards of single answers.

    Attributes:
        losses: (rows,) differentiable.
        rewards: (rows,) β r, detached.
        desired: (rows,) bool.
        accuracies: (rows,) 1 if the reward is on the correct side of β z, 0.5 if it is equal.
    """

    losses: Tensor
    rewards: Tensor
    desired: Tensor
    accuracies: Tensor


class AnswerMetrics(MetricAccumulator):
    """Accumulates accuracy, divergence, and rewards and counts of desired and undesired answers."""

    size = 6

    def add(self, losses: AnswerLosses, divergence: Tensor) -> None:
        """Add a microbatch. ``divergence`` is shared by all answers of the step."""
        rewards = losses.rewards
        desired = losses.desired.to(losses.rewards.dtype)
        parts = losses.accuracies, rewards * desired, rewards * (1 - desired), desired, 1 - desired
        self._plus([*(part.sum() for part in parts), divergence.to(rewards) * len(rewards)])

    def means(self) -> dict[str, float]:
        sums = self.totals().tolist()
        return answer_metrics(sums) if sums[3] + sums[4] else {}


class UnpairedLoss:
    """KTO loss. The unit is an answer.

    Attributes:
        divergence: z, a scalar tensor. Set it for the next rows with :meth:`estimate`.
        accumulator: Rewards of the answers since it was last cleared.
    """

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.divergence = torch.zeros(())
        self.accumulator = AnswerMetrics()

    def estimate(self, sums: Tensor) -> None:
        """Set z from (2,) the sum of r over mismatched answers and their number."""
        self.divergence = (sums[0] / sums[1]).clamp(min=0)

    def divergence_sums(self, rows: RowLogProbs) -> Tensor:
        """Return (2,) the sum of r over rows and their number, detached. :meth:`estimate` takes their total."""
        ratios = detach_wide(self.ratios(rows))
        return torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])

    def ratios(self, rows: RowLogProbs) -> Tensor:
        """Return (rows,) r, differentiable."""
        sums = rows.sums()
        return sums - reference_sums(rows, sums)

    def __call__(self, rows: RowLogProbs) -> Tensor:
        losses = self.per_row_losses(rows)
        self.accumulator.add(losses, self.divergence)
        return losses.losses.sum()

    def units(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def per_row_losses(self, rows: RowLogProbs) -> AnswerLosses:
        """Return the losses and rewards of a microbatch's answers, in the order of ``rows.rows``."""
        settings = self.settings
        ratios = self.ratios(rows)
        desired = torch.tensor([bool(row.desired) for row in rows.rows], device=ratios.device)
        # Positive if the answer is on the side of z that matches its label.
        signs = desired.to(ratios.dtype) * 2 - 1
        margins = signs * (ratios - self.divergence.to(ratios.device, ratios.dtype))
        weights = torch.where(desired, settings.desirable_weight, settings.undesirable_weight)
        losses = weights.to(ratios.dtype) * torch.sigmoid(-settings.effective_beta * margins)
        rewards = settings.effective_beta * ratios.detach()
        return AnswerLosses(losses, rewards, desired, margins.detach().sign() / 2 + 0.5)


def answer_metrics(sums: Sequence[float]) -> dict[str, float]:
    """Return metrics by name from the sums of :class:`AnswerMetrics`.

    A kind of answers that does not occur has no metric.
    """
    accuracies, desired_reward, undesired_reward, desired_count, undesired_count, kl = sums
    count = desired_count + undesired_count
    metrics = {"accuracy": accuracies / count, "kl": kl / count}
    if desired_count:
        metrics["chosen_reward"] = desired_reward / desired_count
    if undesired_count:
        metrics["rejected_reward"] = undesired_reward / undesired_count
    if desired_count and undesired_count:
        metrics["margin"] = metrics["chosen_reward"] - metrics["rejected_reward"]
    return metrics
