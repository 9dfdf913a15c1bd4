"""Losses of language models: functions of the log-probability of each label token, row by row.

An objective runs the model on a microbatch and hands over :class:`RowLogProbs`; a loss makes one number of
them, and gradients flow back through it. Objectives over single rows and over pairs or groups of rows (DPO,
ORPO, KTO and their like) are each one small class here or in a user's own file; neither the loop nor the
model's side changes.
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
from deltaw.data.packing import Batch
from deltaw.errors import UserError
from deltaw.kernels.transfer import to_device
from deltaw.task_settings import PreferenceSettings


@dataclass(frozen=True, eq=False)
class RowLogProbs:
    """The log-probabilities of a microbatch's label tokens, and which rows they belong to.

    What rows share is computed once, so that one value can belong to several rows.

    Attributes:
        values: (P,) log p(token | tokens before it) in nats, differentiable, fp32 (fp64 for an fp64 model).
        index: (E,) int64, for each label of each row its place in ``values``; rows one after another.
        row: (E,) int64, the row of each entry of ``index``, a place in ``rows``.
        rows: the rows of the microbatch.
        groups: for each group of rows its rows' places in ``rows``; empty where rows come one by one.
    """

    values: Tensor
    index: Tensor
    row: Tensor
    rows: tuple[Example, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, batch: Batch, values: Tensor) -> RowLogProbs:
        """Of a batch, whose ``targets`` have these log-probabilities (P,)."""
        index, row = (to_device(torch.from_numpy(places), values.device) for places in label_places(batch))
        return cls(values, index, row, tuple(member.example for member in batch.members), batch.groups)

    def sums(self) -> Tensor:
        """(rows,) the log-probability of each row's labels together."""
        zeros = self.values.new_zeros(len(self.rows))
        return zeros.index_add(0, self.row, self.values.index_select(0, self.index))

    def counts(self) -> Tensor:
        """(rows,) labels of each row, in the type of ``values``."""
        zeros = self.values.new_zeros(len(self.rows))
        return zeros.index_add(0, self.row, zeros.new_ones(len(self.row)))

    def grouped(self, per_row: Tensor) -> Tensor:
        """(rows,) to (groups, rows of a group), in each group's order.

        Raises:
            ValueError: the groups are of different sizes, or there are none.
        """
        if not self.groups or len({len(group) for group in self.groups}) != 1:
            raise ValueError("the rows of this microbatch are not in groups of one size")
        return per_row[to_device(torch.tensor(self.groups), per_row.device)]


def unrounded(loss: Tensor) -> Tensor:
    """A loss without its graph, for adding many up: in fp64, where its device has that."""
    return loss.detach() if loss.device.type == "mps" else loss.detach().double()


class Loss(Protocol):
    """What a training makes small."""

    def __call__(self, rows: RowLogProbs) -> Tensor:
        """The sum of a microbatch's losses, a scalar; independent of how a step is cut."""

    def units(self, rows: Sequence[Any]) -> int:
        """What the sum over these rows, or groups of rows, is divided by."""


class Watched(abc.ABC):
    """Sums that a loss keeps beside its own, over a step and on their device; no training depends on them.

    Attributes:
        size: how many sums there are, whatever was counted, so that those of several processes can be added up.
    """

    size: int
    sums: Tensor | None = None

    def clear(self) -> None:
        """Begin a step."""
        self.sums = None

    def totals(self) -> Tensor:
        """(size,) the sums, 0 where nothing was counted."""
        return torch.zeros(self.size, dtype=torch.float64) if self.sums is None else self.sums

    def count(self, totals: Tensor) -> None:
        """Have these sums instead, those of all processes."""
        self.sums = totals

    @abc.abstractmethod
    def means(self) -> dict[str, float]:
        """Metrics of the step by name, empty if nothing was counted; waits for the device."""

    def _plus(self, parts: Sequence[Tensor]) -> None:
        """Add the sums of a microbatch."""
        sums = unrounded(torch.stack(list(parts)))
        self.sums = sums if self.sums is None else self.sums + sums


class CrossEntropy:
    """−Σ log p over the labels of all rows; its unit is a label token.

    Each label's weight is known before the model runs, so that the objective takes the gradient while a
    chunk's logits are there; this definition is what that is equal to.
    """

    def __call__(self, rows: RowLogProbs) -> Tensor:
        return -rows.sums().sum()

    def units(self, rows: Sequence[Any]) -> int:
        return sum(row.label_count for row in rows)


def label_places(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For each label of each member: its place among the batch's ``targets``, and the member's number."""
    places = [member.places[member.example.is_label] for member in batch.members]
    every = np.concatenate(places)
    # Targets stand in the order of their tokens in the batch.
    index = np.searchsorted(np.unique(every), every)
    return index, np.repeat(np.arange(len(places)), [len(own) for own in places])


# Losses of pairs of answers, DPO, IPO, ORPO and SimPO, of log-probabilities of a chosen and a rejected one.
#
# A group of rows is a pair: the chosen answer with its prompt, then the rejected one with the same prompt. What
# a reference model gives them is a number that each row brings along. Knows no model and no data.
#
# With s the sum of an answer's log-probabilities, n its number of label tokens, s° the sum of the reference
# model, and Δ the difference of chosen and rejected:
#
# - DPO (arXiv 2305.18290, eq. 7), with label smoothing ε (conservative DPO, 2023):
# −(1−ε) log σ(β Δ(s−s°)) − ε log σ(−β Δ(s−s°)).
# - IPO (arXiv 2310.12036, eq. 17), over means, as its authors computed it: (Δ((s−s°)/n) − 1/(2β))².
# - ORPO (arXiv 2403.07691, eqs. 6 and 7): −s/n of the chosen − β log σ(Δ log odds), log odds = s/n − log(1 −
# exp(s/n)).
# - SimPO (arXiv 2405.14734, eq. 6): DPO's form of β Δ(s/n) − γ.


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


class StepMetrics(Watched):
    """Of pairs: their accuracies, both rewards, and how many there are."""

    size = 4

    def add(self, found: PairLosses) -> None:
        """Add a microbatch."""
        pairs = found.rewards.new_tensor(float(len(found.losses)))
        self._plus([found.accuracies.sum(), *found.rewards.sum(0), pairs])

    def means(self) -> dict[str, float]:
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
            logits = logits - settings.target_margin
        smoothing = settings.label_smoothing
        return PairLosses(-(1 - smoothing) * logsigmoid(logits) - smoothing * logsigmoid(-logits), rewards)


def named(accuracy: float, chosen: float, rejected: float) -> dict[str, float]:
    """Metrics of rewards by their names."""
    return {"accuracy": accuracy, "margin": chosen - rejected, "chosen_reward": chosen, "rejected_reward": rejected}


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) of x < 0, without cancellation at either end; x nearer to 0 than rounding can tell counts
    as that near."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    middle = -math.log(2)
    # Each branch is given values that are in its range, so that the other's gradient is no nan.
    near, far = torch.log(-torch.expm1(x.clamp(min=middle))), torch.log1p(-torch.exp(x.clamp(max=middle)))
    return torch.where(x > middle, near, far)


def references_of(rows: RowLogProbs, like: Tensor) -> Tensor:
    """(rows,) the sums of the reference model.

    Raises:
        UserError: a row has none.
    """
    values = [row.reference for row in rows.rows]
    if None in values:
        what, hint = "the rows have no log-probabilities of the reference model", "call the task's referenced() first"
        raise UserError(what, where="preference.loss", hint=hint)
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)


# KTO (arXiv 2402.01306, eqs. 7 and 8): a loss of single answers, desired or not, against a reference.
#
# With r = s − s°, an answer's log-probability less the reference model's, and z the mean of r over prompts with
# other rows' answers, no less than 0 and taken as a constant, the loss is w (1 − σ(β (r − z))) of a desired
# answer and w (1 − σ(β (z − r))) of another. z estimates how far the model is from the reference. As TRL's
# KTOTrainer has it; z is one number for all rows of an optimizer step, however they are cut.


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


class AnswerMetrics(Watched):
    """Of answers: their accuracies, rewards of either kind, how many of either, and divergences."""

    size = 6

    def add(self, found: AnswerLosses, divergence: Tensor) -> None:
        """Add a microbatch, whose answers count with the same divergence as the step's others."""
        rewards, desired = found.rewards, found.desired.to(found.rewards.dtype)
        parts = found.accuracies, rewards * desired, rewards * (1 - desired), desired, 1 - desired
        self._plus([*(part.sum() for part in parts), divergence.to(rewards.dtype) * len(rewards)])

    def means(self) -> dict[str, float]:
        sums = self.totals().tolist()
        return named_answers(sums) if sums[3] + sums[4] else {}


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


def named_answers(sums: Sequence[float]) -> dict[str, float]:
    """Metrics by their names, from the sums of :class:`AnswerMetrics`; a kind of answers that is not there has
    none."""
    accuracies, desired, undesired, desired_count, others, kl = sums
    count = desired_count + others
    found = {"accuracy": accuracies / count, "kl": kl / count}
    if desired_count:
        found["chosen_reward"] = desired / desired_count
    if others:
        found["rejected_reward"] = undesired / others
    if desired_count and others:
        found["margin"] = found["chosen_reward"] - found["rejected_reward"]
    return found
