"""Losses and evaluation of preferences: pairs of answers, and single desired or undesired answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from deltaw.data.example import RowGroup
from deltaw.data.packing import MicroBatch
from deltaw.errors import UserError
from deltaw.kernels.layout import to_device
from deltaw.tasks.preference.settings import PreferenceSettings
from deltaw.training.batcher import Batcher
from deltaw.training.evaluation.base import Evaluation, check_finite
from deltaw.training.losses import MetricAccumulator, RowLogProbs, detach_wide, log1mexp

# Losses of preference pairs: DPO, IPO, ORPO and SimPO.
#
# A group of rows is a pair: the chosen answer with its prompt, then the rejected answer with the same prompt. Each row
# stores its log-probability under the reference model.
#
# Let s be the sum of an answer's log-probabilities, n its number of label tokens, s° the sum under the reference
# model, and Δ the difference between chosen and rejected:
#
# - DPO (arXiv 2305.18290, eq. 7), with label smoothing ε (conservative DPO, 2023):
# −(1−ε) log σ(β Δ(s−s°)) − ε log σ(−β Δ(s−s°)).
# - IPO (arXiv 2310.12036, eq. 17), over means as in its authors' code: (Δ((s−s°)/n) − 1/(2β))².
# - ORPO (arXiv 2403.07691, eqs. 6 and 7): −s/n of the chosen − β log σ(Δ log odds), log odds = s/n − log(1 −
# exp(s/n)).
# - SimPO (arXiv 2405.14734, eq. 6): DPO's form of β Δ(s/n) − γ.


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


# KTO (arXiv 2402.01306, eqs. 7 and 8): a loss of single desired or undesired answers with a reference model.
#
# Let r = s − s° be the difference of an answer's log-probabilities under model and reference model. Let z be the mean
# of r over prompts with answers of other rows, at least 0 and constant. It estimates the divergence from the reference
# model. The loss is w (1 − σ(β (r − z))) for desired answers and w (1 − σ(β (z − r))) for undesired ones, as in TRL's
# KTOTrainer. z is shared by all rows of an optimizer step.


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


@torch.no_grad()
def evaluate_pairs(
    pairs: Sequence[RowGroup], batcher: Batcher, losses_of: Callable[[MicroBatch], PairLosses]
) -> tuple[Evaluation, np.ndarray]:
    """Evaluate pairs of a chosen and a rejected row.

    The metrics are the mean loss, the accuracy (share of pairs whose chosen row has the higher reward, where equal
    rewards count half), the mean reward margin and the mean rewards.

    Args:
        losses_of: Returns the losses of the pairs of a microbatch.

    Returns:
        The evaluation with primary metric ``accuracy``, and the rewards (pairs, 2) of chosen and rejected rows.

    Raises:
        UserError: if a loss or a reward is not finite.
    """
    indices = {id(pair.rows[0]): index for index, pair in enumerate(pairs)}
    table = np.empty((len(pairs), 4))  # loss, accuracy, rewards
    for batch in batcher.batches(pairs):
        pair_losses = losses_of(batch)
        values = torch.cat([pair_losses.losses[:, None], pair_losses.accuracies[:, None], pair_losses.rewards], 1)
        table[[indices[id(row)] for row in batch.examples[::2]]] = values.cpu().double().numpy()
    check_finite("the losses and rewards of the evaluated pairs are", table)
    loss, *means = table.mean(0).tolist()
    accuracies = table[:, 1].copy()
    return Evaluation.of_rows({"loss": loss, **preference_metrics(*means)}, "accuracy", accuracies), table[:, 2:].copy()
