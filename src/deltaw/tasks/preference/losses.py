"""Losses of preference pairs: DPO, IPO, ORPO and SimPO.

A group of rows is a pair: the chosen answer with its prompt, then the rejected answer with the same prompt. Each row
stores its log-probability under the reference model.

Let s be the sum of an answer's log-probabilities, n its number of label tokens, s° the sum under the reference
model, and Δ the difference between chosen and rejected:

- DPO (arXiv 2305.18290, eq. 7), with label smoothing ε (conservative DPO, 2023):
  −(1−ε) log σ(β Δ(s−s°)) − ε log σ(−β Δ(s−s°)).
- IPO (arXiv 2310.12036, eq. 17), over means as in its authors' code: (Δ((s−s°)/n) − 1/(2β))².
- ORPO (arXiv 2403.07691, eqs. 6 and 7): −s/n of the chosen − β log σ(Δ log odds), log odds = s/n − log(1 −
  exp(s/n)).
- SimPO (arXiv 2405.14734, eq. 6): DPO's form of β Δ(s/n) − γ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from deltaw.errors import UserError
from deltaw.kernels.layout import to_device
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.training.losses import MetricAccumulator, RowLogProbs, log1mexp


@dataclass(frozen=True)
class PairLosses:
    """Losses and rewards of preference pairs.

    Attributes:
        losses: (pairs,) differentiable.
        rewards: (pairs, 2) rewards of chosen and rejected, detached.
    """

    losses: Tensor
    rewards: Tensor

    @property
    def accuracies(self) -> Tensor:
        """(pairs,) 1 if the chosen answer has the higher reward, 0.5 if both are equal."""
        return (self.rewards[:, 0] - self.rewards[:, 1]).sign() / 2 + 0.5


class StepMetrics(MetricAccumulator):
    """Accumulates the accuracy and both rewards of pairs."""

    size = 4

    def add(self, losses: PairLosses) -> None:
        """Add a microbatch."""
        pairs = losses.rewards.new_full((), len(losses.losses))
        self._plus([losses.accuracies.sum(), *losses.rewards.sum(0), pairs])

    def means(self) -> dict[str, float]:
        *sums, pairs = self.totals().tolist()
        return preference_metrics(*(value / pairs for value in sums)) if pairs else {}


class PreferenceLoss:
    """Preference loss selected by the settings. The unit is a pair.

    Attributes:
        accumulator: Rewards of the pairs since it was last cleared.
    """

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.accumulator = StepMetrics()

    def __call__(self, rows: RowLogProbs) -> Tensor:
        losses = self.per_row_losses(rows)
        self.accumulator.add(losses)
        return losses.losses.sum()

    def units(self, rows: Sequence[Any]) -> int:
        return len(rows)

    def per_row_losses(self, rows: RowLogProbs) -> PairLosses:
        """Return the losses and rewards of a microbatch's pairs, in batch order."""
        sums = rows.grouped(rows.sums())
        counts = rows.grouped(rows.counts())
        if not self.settings.has_reference:
            return self.pair_losses(sums, counts)
        return self.pair_losses(sums, counts, rows.grouped(reference_sums(rows, sums)))

    def pair_losses(self, sums: Tensor, counts: Tensor, references: Tensor | None = None) -> PairLosses:
        """Return losses and rewards.

        Args:
            sums: (pairs, 2) sums of log-probabilities of chosen and rejected.
            counts: (pairs, 2) numbers of labels.
            references: (pairs, 2) sums under the reference model.
        """
        settings = self.settings
        beta = self.settings.effective_beta
        scores = sums
        if settings.has_reference:
            assert references is not None
            scores = sums - references
        if settings.loss != "dpo":
            scores = scores / counts
        margins = scores[:, 0] - scores[:, 1]
        rewards = (beta * scores).detach()
        if settings.loss == "ipo":
            return PairLosses((margins - 1 / (2 * beta)).square(), rewards)
        if settings.loss == "orpo":
            odds = scores - log1mexp(scores)
            return PairLosses(-scores[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1]), rewards)
        logits = beta * margins
        if settings.loss == "simpo":
            logits = logits - settings.effective_gamma
        smoothing = settings.label_smoothing
        return PairLosses(-(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits), rewards)


def preference_metrics(accuracy: float, chosen: float, rejected: float) -> dict[str, float]:
    """Return metrics of preference rewards by name."""
    return {"accuracy": accuracy, "margin": chosen - rejected, "chosen_reward": chosen, "rejected_reward": rejected}


def reference_sums(rows: RowLogProbs, like: Tensor) -> Tensor:
    """Return (rows,) the log-probabilities under the reference model.

    Raises:
        UserError: if a row has no reference.
    """
    values = [row.reference for row in rows.rows]
    if None in values:
        message = "the rows have no log-probabilities of the reference model"
        hint = "call the task's add_reference_log_probs() first"
        raise UserError(message, location="preference.loss", hint=hint)
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)
