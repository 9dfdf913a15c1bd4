"""Losses of language models: functions of the log-probability of each label token, row by row.

An objective runs the model on a microbatch and hands over :class:`RowLogProbs`; a loss makes one number of
them, and gradients flow back through it. Objectives over single rows and over pairs or groups of rows (DPO,
ORPO, KTO and their like) are each one small class here or in a user's own file; neither the loop nor the
model's side changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.data.packing import Batch
from deltaw.kernels.transfer import to_device


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
        index, row = label_places(batch)
        device = values.device
        return cls(
            values,
            to_device(torch.from_numpy(index), device),
            to_device(torch.from_numpy(row), device),
            tuple(member.example for member in batch.members),
            batch.groups,
        )

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
        ...

    def units(self, rows: Sequence[Any]) -> int:
        """What the sum over these rows, or groups of rows, is divided by."""
        ...


class Watched(Protocol):
    """What a loss counts beside its sum; nothing of it changes a training."""

    def clear(self) -> None:
        """Begin a step."""
        ...

    def totals(self) -> Tensor:
        """(n,) the sums so far: as many numbers whatever was counted, so that those of several processes can
        be added up."""
        ...

    def count(self, totals: Tensor) -> None:
        """Have these sums instead, those of all processes."""
        ...

    def means(self) -> dict[str, float]:
        """Metrics of the step by name; waits for the device."""
        ...


@dataclass
class WatchedSums:
    """What most of :class:`Watched` are: sums over a step, on their device; ``means`` is left to each.

    Attributes:
        size: how many sums there are.
    """

    size: ClassVar[int]
    sums: Tensor | None = field(default=None, repr=False)

    def clear(self) -> None:
        """Begin a step."""
        self.sums = None

    def totals(self) -> Tensor:
        """(size,) the sums, 0 where nothing was counted."""
        return torch.zeros(self.size, dtype=torch.float64) if self.sums is None else self.sums

    def count(self, totals: Tensor) -> None:
        """Have these sums instead."""
        self.sums = totals

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
