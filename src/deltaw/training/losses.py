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

from deltaw.data.example import Example
from deltaw.data.packing import MicroBatch
from deltaw.kernels.layout import to_device
from deltaw.kernels.operators import widest_dtype


@dataclass(frozen=True, eq=False)
class RowLogProbs:
    """Log-probabilities of a microbatch's label tokens, assigned to rows.

    Shared prefixes are computed once, so a value can belong to several rows.

    Attributes:
        values: (P,) log p(token | previous tokens) in nats, differentiable, fp32 (fp64 for an fp64 model).
        index: (E,) int64, index into ``values`` for each label of each row, row by row.
        row: (E,) int64, index into ``rows`` for each entry of ``index``.
        rows: Rows of the microbatch.
        sizes: Number of rows of each group, which are consecutive. Empty if rows are not grouped.
    """

    values: Tensor
    index: Tensor
    row: Tensor
    rows: tuple[Example, ...]
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, batch: MicroBatch, values: Tensor) -> RowLogProbs:
        """Assign the log-probabilities (P,) of a batch's ``targets`` to its rows."""
        index, row = (to_device(torch.from_numpy(indices), values.device) for indices in label_indices(batch))
        return cls(values, index, row, tuple(batch.examples), batch.sizes)

    def sums(self) -> Tensor:
        """Return (rows,) the summed log-probability of each row's labels."""
        values = self.values.index_select(0, self.index)
        return values.new_zeros(len(self.rows)).index_add(0, self.row, values)

    def counts(self) -> Tensor:
        """Return (rows,) the number of labels of each row, in the dtype of ``values``."""
        zeros = self.values.new_zeros(len(self.rows))
        return zeros.index_add(0, self.row, zeros.new_ones(len(self.row)))

    def grouped(self, per_row: Tensor) -> Tensor:
        """Reshape (rows,) to (groups, rows per group).

        Raises:
            ValueError: if the groups differ in size or the rows are not grouped.
        """
        if len(set(self.sizes)) != 1:
            raise ValueError("the rows of this microbatch are not in groups of one size")
        return per_row.view(len(self.sizes), -1)


def detach_wide(loss: Tensor) -> Tensor:
    """Detach a loss for accumulation, in fp64 if the device supports it."""
    return loss.detach().to(widest_dtype(loss.device))


def in_fp64(values: Tensor) -> Tensor:
    """Return values in fp64, on the CPU if their device has no fp64."""
    return (values if widest_dtype(values.device) == torch.float64 else values.cpu()).double()


class Loss(Protocol):
    """Loss function of a training task."""

    def __call__(self, rows: RowLogProbs) -> Tensor:
        """Return the summed loss of a microbatch, a scalar. It does not depend on the division of a step."""

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


def label_indices(batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return for each label of each member its index in the batch's ``targets``, and the index of the member."""
    positions = [member.indices[member.example.is_label] for member in batch.members]
    all_positions = np.concatenate(positions)
    # Targets are sorted by token position in the batch.
    index = np.searchsorted(np.unique(all_positions), all_positions)
    return index, np.repeat(np.arange(len(positions)), [len(member_positions) for member_positions in positions])


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) of x < 0 without cancellation. Values closer to 0 than machine epsilon are clamped to it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    middle = -math.log(2)
    # Clamp the input of each branch to its range, so that the unused branch has no NaN gradient.
    near = torch.log(-torch.expm1(x.clamp(min=middle)))
    far = torch.log1p(-torch.exp(x.clamp(max=middle)))
    return torch.where(x > middle, near, far)


def with_remainder(logprobs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: (P, k) to (P, k + 1)."""
    return torch.cat([logprobs, log1mexp(logprobs.logsumexp(-1, keepdim=True))], -1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (P,) KL(p ‖ q) in nats of log-probabilities (P, tokens), differentiable in both arguments."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
