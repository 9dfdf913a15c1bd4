"""Losses of pairs of answers, DPO, IPO, ORPO and SimPO, of log-probabilities of a chosen and a rejected one.

A group of rows is a pair: the chosen answer with its prompt, then the rejected one with the same prompt. What
a reference model gives them is a number that each row brings along. Knows no model and no data.

With s the sum of an answer's log-probabilities, n its number of label tokens, s° the sum of the reference
model, and Δ the difference of chosen and rejected:

- DPO (arXiv 2305.18290, eq. 7), with label smoothing ε (conservative DPO, 2023):
  −(1−ε) log σ(β Δ(s−s°)) − ε log σ(−β Δ(s−s°)).
- IPO (arXiv 2310.12036, eq. 17), over means, as its authors computed it: (Δ((s−s°)/n) − 1/(2β))².
- ORPO (arXiv 2403.07691, eqs. 6 and 7): −s/n of the chosen − β log σ(Δ log odds), log odds = s/n − log(1 −
  exp(s/n)).
- SimPO (arXiv 2405.14734, eq. 6): DPO's form of β Δ(s/n) − γ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from deltaw.errors import UserError
from deltaw.kernels.transfer import to_device
from deltaw.preference_settings import PreferenceSettings
from deltaw.training.losses import RowLogProbs, WatchedSums


@dataclass(frozen=True)
class PairLosses:
    """What a loss makes of pairs.

    Attributes:
        losses: (pairs,) differentiable. rewards: (pairs, 2) of chosen and rejected, without a graph.
    """

    losses: Tensor
    rewards: Tensor

    @property
    def accuracies(self) -> Tensor:
        """(pairs,) 1 where the chosen answer has the higher reward, 0.5 where both have the same."""
        return (self.rewards[:, 0] - self.rewards[:, 1]).sign() / 2 + 0.5


class StepMetrics(WatchedSums):
    """Of pairs: their accuracies, both rewards, and how many there are."""

    size = 4

    def add(self, found: PairLosses) -> None:
        """Add a microbatch."""
        pairs = found.rewards.new_tensor(float(len(found.losses)))
        self._plus([found.accuracies.sum(), *found.rewards.sum(0), pairs])

    def means(self) -> dict[str, float]:
        """By name; empty where there was no pair."""
        *sums, pairs = self.totals().tolist()
        return named(*(value / pairs for value in sums)) if pairs else {}


class PreferenceLoss:
    """The loss of pairs that the settings name; its unit is a pair.

    Attributes:
        watched: rewards of the pairs since it was last cleared.
    """

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.watched = StepMetrics()

    def __call__(self, rows: RowLogProbs) -> Tensor:
        found = self.of_rows(rows)
        self.watched.add(found)
        return found.losses.sum()

    def units(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def of_rows(self, rows: RowLogProbs) -> PairLosses:
        """The losses and rewards of a microbatch's pairs, in the order of ``rows.groups``."""
        sums, counts = rows.grouped(rows.sums()), rows.grouped(rows.counts())
        if not self.settings.has_reference:
            return self.of_pairs(sums, counts)
        return self.of_pairs(sums, counts, rows.grouped(references_of(rows, sums)))

    def of_pairs(self, sums: Tensor, counts: Tensor, references: Tensor | None = None) -> PairLosses:
        """Losses and rewards.

        Args:
            sums, counts, references: (pairs, 2) of chosen and rejected: the sum of log-probabilities, the
                number of labels, and the reference model's sum.
        """
        settings, beta = self.settings, self.settings.strength
        if settings.has_reference:
            assert references is not None
            ratios = sums - references
            scores = ratios if settings.loss == "dpo" else ratios / counts
        else:
            scores = sums / counts
        margins = scores[:, 0] - scores[:, 1]
        rewards = (beta * scores).detach()
        if settings.loss == "ipo":
            return PairLosses((margins - 1 / (2 * beta)).square(), rewards)
        if settings.loss == "orpo":
            odds = scores - log1mexp(scores)
            return PairLosses(-scores[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1]), rewards)
        logits = beta * margins
        if settings.loss == "simpo":
            logits = logits - settings.target_margin
        smoothing = settings.label_smoothing
        return PairLosses(-(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits), rewards)


def named(accuracy: float, chosen: float, rejected: float) -> dict[str, float]:
    """Metrics of rewards by their names."""
    return {
        "accuracy": accuracy,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) of x < 0, without cancellation at either end; x nearer to 0 than rounding can tell counts
    as that near."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # Each branch is given values that are in its range, so that the other's gradient is no nan.
    return torch.where(
        near,
        torch.log(-torch.expm1(x.clamp(min=-math.log(2)))),
        torch.log1p(-torch.exp(x.clamp(max=-math.log(2)))),
    )


def references_of(rows: RowLogProbs, like: Tensor) -> Tensor:
    """(rows,) the sums of the reference model.

    Raises:
        UserError: a row has none.
    """
    values = [row.reference for row in rows.rows]
    if any(value is None for value in values):
        raise UserError(
            "the rows have no log-probabilities of the reference model",
            where="preference.loss",
            hint="give rows to the task's referenced() first",
        )
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)
