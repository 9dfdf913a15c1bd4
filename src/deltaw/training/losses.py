"""Losses of language models, computed from the log-probabilities of label tokens.

An objective runs the model on a microbatch and passes :class:`RowLogProbs` to a loss. A loss is a small class for
single rows, pairs or groups of rows (DPO, ORPO, KTO and similar), here or in a user's file.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from deltaw.data.example import Example
from deltaw.data.packing import PackedBatch
from deltaw.errors import UserError
from deltaw.kernels.transfer import to_device
from deltaw.task_settings import PreferenceSettings


@dataclass(frozen=True, eq=False)
class RowLogProbs:
    """Log-probabilities of a microbatch's label tokens, assigned to rows.

    Shared prefixes are computed once, so a value can belong to several rows.

    Attributes:
        values: (P,) log p(token | previous tokens) in nats, differentiable, fp32 (fp64 for an fp64 model).
        index: (E,) int64, index into ``values`` for each label of each row, row by row.
        row: (E,) int64, index into ``rows`` for each entry of ``index``.
        rows: Rows of the microbatch.
        groups: Indices of each group's rows. Empty if rows are not grouped.
    """

    values: Tensor
    index: Tensor
    row: Tensor
    rows: tuple[Example, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, batch: PackedBatch, values: Tensor) -> RowLogProbs:
        """Assign the log-probabilities (P,) of a batch's ``targets`` to its rows."""
        index, row = (to_device(torch.from_numpy(indices), values.device) for indices in label_indices(batch))
        return cls(values, index, row, tuple(member.example for member in batch.members), batch.groups)

    def sums(self) -> Tensor:
        """Return (rows,) the summed log-probability of each row's labels."""
        zeros = self.values.new_zeros(len(self.rows))
        return zeros.index_add(0, self.row, self.values.index_select(0, self.index))

    def counts(self) -> Tensor:
        """Return (rows,) the number of labels of each row, in the dtype of ``values``."""
        zeros = self.values.new_zeros(len(self.rows))
        return zeros.index_add(0, self.row, zeros.new_ones(len(self.row)))

    def grouped(self, per_row: Tensor) -> Tensor:
        """Reshape (rows,) to (groups, rows per group), in the order of each group.

        Raises:
            ValueError: if the groups differ in size or the rows are not grouped.
        """
        if not self.groups or len({len(group) for group in self.groups}) != 1:
            raise ValueError("the rows of this microbatch are not in groups of one size")
        return per_row[to_device(torch.tensor(self.groups), per_row.device)]


def detach_wide(loss: Tensor) -> Tensor:
    """Detach a loss for accumulation, in fp64 if the device supports it."""
    return loss.detach() if loss.device.type == "mps" else loss.detach().double()


class Loss(Protocol):
    """Loss function of a training task."""

    def __call__(self, rows: RowLogProbs) -> Tensor:
        """Return the summed loss of a microbatch, a scalar. It does not depend on how a step is split."""

    def units(self, rows: Sequence[Any]) -> int:
        """Return the divisor of the summed loss of these rows or groups of rows."""


class MetricAccumulator(abc.ABC):
    """Accumulates metrics of a step on the device, in addition to the loss.

    Attributes:
        size: Number of sums. It is constant, so that the sums of several processes can be added.
        sums: (size,) the sums, or None at the start of a step.
    """

    size: int
    sums: Tensor | None = None

    def clear(self) -> None:
        """Start a step."""
        self.sums = None

    def totals(self) -> Tensor:
        """Return (size,) the sums, or zeros if empty."""
        return torch.zeros(self.size, dtype=torch.float64) if self.sums is None else self.sums

    def count(self, totals: Tensor) -> None:
        """Replace the sums by those of all processes."""
        self.sums = totals

    @abc.abstractmethod
    def means(self) -> dict[str, float]:
        """Return the metrics of the step by name, possibly empty. Synchronizes with the device."""

    def _plus(self, parts: Sequence[Tensor]) -> None:
        """Add the sums of a microbatch."""
        sums = detach_wide(torch.stack(list(parts)))
        self.sums = sums if self.sums is None else self.sums + sums


class CrossEntropy:
    """−Σ log p over the labels of all rows. The unit is a label token.

    The objective computes the same gradient chunk by chunk while the logits are in memory, because the weight of each
    label is known in advance.
    """

    def __call__(self, rows: RowLogProbs) -> Tensor:
        return -rows.sums().sum()

    def units(self, rows: Sequence[Any]) -> int:
        return sum(row.label_count for row in rows)


def label_indices(batch: PackedBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return for each label of each member its index among the batch's ``targets``, and the index of the member."""
    positions = [member.indices[member.example.is_label] for member in batch.members]
    all_positions = np.concatenate(positions)
    # Targets are sorted by token position in the batch.
    index = np.searchsorted(np.unique(all_positions), all_positions)
    return index, np.repeat(np.arange(len(positions)), [len(member_positions) for member_positions in positions])


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
        pairs = losses.rewards.new_tensor(float(len(losses.losses)))
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
        """Return the losses and rewards of a microbatch's pairs, in the order of ``rows.groups``."""
        sums, counts = rows.grouped(rows.sums()), rows.grouped(rows.counts())
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
        settings, beta = self.settings, self.settings.effective_beta
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


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) of x < 0 without cancellation. Values closer to 0 than machine epsilon are clamped to it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    middle = -math.log(2)
    # Clamp the input of each branch to its range, so that the unused branch has no NaN gradient.
    near, far = torch.log(-torch.expm1(x.clamp(min=middle))), torch.log1p(-torch.exp(x.clamp(max=middle)))
    return torch.where(x > middle, near, far)


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
        rewards, desired = losses.rewards, losses.desired.to(losses.rewards.dtype)
        parts = losses.accuracies, rewards * desired, rewards * (1 - desired), desired, 1 - desired
        self._plus([*(part.sum() for part in parts), divergence.to(rewards.dtype) * len(rewards)])

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
        settings, ratios = self.settings, self.ratios(rows)
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
