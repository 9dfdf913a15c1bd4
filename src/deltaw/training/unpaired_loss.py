"""KTO (arXiv 2402.01306, eqs. 7 and 8): a loss of single answers, desired or not, against a reference.

With r = s − s°, an answer's log-probability less the reference model's, and z the mean of r over prompts with
other rows' answers, no less than 0 and taken as a constant, the loss is w (1 − σ(β (r − z))) of a desired
answer and w (1 − σ(β (z − r))) of another. z estimates how far the model is from the reference. As TRL's
KTOTrainer has it; z is one number for all rows of an optimizer step, however they are cut.

Knows no model and no data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.preference_settings import PreferenceSettings
from deltaw.training.losses import RowLogProbs, WatchedSums, unrounded
from deltaw.training.preference_losses import references_of


@dataclass(frozen=True)
class AnswerLosses:
    """What the loss makes of answers.

    Attributes:
        losses: (rows,) differentiable. rewards: (rows,) β r, without a graph. desired: (rows,) bool.
        accuracies: (rows,) 1 where the reward is on the right side of β z, 0.5 where it is on neither.
    """

    losses: Tensor
    rewards: Tensor
    desired: Tensor
    accuracies: Tensor


class AnswerMetrics(WatchedSums):
    """Of answers: their accuracies, rewards of either kind, how many of either, and divergences."""

    size = 6

    def add(self, found: AnswerLosses, divergence: Tensor) -> None:
        """Add a microbatch, whose answers count with the same divergence as the step's others."""
        rewards, desired = found.rewards, found.desired.to(found.rewards.dtype)
        self._plus(
            [
                found.accuracies.sum(),
                (rewards * desired).sum(),
                (rewards * (1 - desired)).sum(),
                desired.sum(),
                (1 - desired).sum(),
                divergence.to(rewards.dtype) * len(rewards),
            ]
        )

    def means(self) -> dict[str, float]:
        """By name; empty where there was no answer."""
        sums = self.totals().tolist()
        return named_answers(*sums) if sums[3] + sums[4] else {}


class UnpairedLoss:
    """KTO's loss; its unit is an answer.

    Attributes:
        divergence: z, a scalar tensor, which :meth:`estimate` sets for the rows that come next.
        watched: rewards of the answers since it was last cleared.
    """

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.divergence = torch.zeros(())
        self.watched = AnswerMetrics()

    def estimate(self, sums: Tensor) -> None:
        """Set z from (2,) the sum of r over prompts with other rows' answers, and their number."""
        self.divergence = (sums[0] / sums[1]).clamp(min=0)

    def distance(self, rows: RowLogProbs) -> Tensor:
        """(2,) the sum of r over rows, and their number, without a graph: what :meth:`estimate` takes,
        summed."""
        ratios = unrounded(self.ratios(rows))
        return torch.stack([ratios.sum(), ratios.new_tensor(float(len(ratios)))])

    def ratios(self, rows: RowLogProbs) -> Tensor:
        """(rows,) r, differentiable."""
        sums = rows.sums()
        return sums - references_of(rows, sums)

    def __call__(self, rows: RowLogProbs) -> Tensor:
        found = self.of_rows(rows)
        self.watched.add(found, self.divergence)
        return found.losses.sum()

    def units(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def of_rows(self, rows: RowLogProbs) -> AnswerLosses:
        """The losses and rewards of a microbatch's answers, in the order of ``rows.rows``."""
        settings, ratios = self.settings, self.ratios(rows)
        desired = torch.tensor([bool(row.desired) for row in rows.rows], device=ratios.device)
        # How far an answer is on the side of z that its label asks for.
        signs = desired.to(ratios.dtype) * 2 - 1
        sides = signs * (ratios - self.divergence.to(ratios.device, ratios.dtype))
        weights = torch.where(desired, settings.desirable_weight, settings.undesirable_weight)
        losses = weights.to(ratios.dtype) * torch.sigmoid(-settings.strength * sides)
        rewards = settings.strength * ratios.detach()
        return AnswerLosses(losses, rewards, desired, sides.detach().sign() / 2 + 0.5)


def named_answers(
    accuracies: float, desired: float, undesired: float, desired_count: float, others: float, kl: float
) -> dict[str, float]:
    """Metrics by their names, from sums over answers; a kind of answers that is not there has none."""
    count = desired_count + others
    found = {"accuracy": accuracies / count, "kl": kl / count}
    if desired_count:
        found["chosen_reward"] = desired / desired_count
    if others:
        found["rejected_reward"] = undesired / others
    if desired_count and others:
        found["margin"] = found["chosen_reward"] - found["rejected_reward"]
    return found
