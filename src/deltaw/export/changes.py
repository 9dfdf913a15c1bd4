"""What an adapter makes of a weight, a block of rows at a time.

Every change turns rows of W into rows of W' = W + ΔW, in fp32 (fp64 for an fp64 weight). All layers'
updates have one form here, ΔW = L·R over the weight's own layout, so that a block of rows of ΔW needs the
same rows of L alone and ΔW is never formed whole.

It knows tensors: no files, no names, no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Blocks = Callable[[], Iterable[tuple[int, Tensor]]]
"""The weight in blocks of rows: (the first row's number, the rows)."""


class Change:
    """How rows of a weight change.

    Attributes:
        whole: whether it needs all rows in one block.
    """

    whole: bool = False

    def prepare(self, blocks: Blocks) -> None:
        """Be shown the weight before the first :meth:`apply`."""

    def apply(self, rows: Tensor, start: int) -> Tensor:
        """Rows ``start`` and on of W, (n, …) in fp32 or fp64, to those of W'; the argument may be changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Factors:
    """ΔW = L·R in the layout of a weight of ``shape``, its dimensions behind the first one flattened.

    Attributes:
        left: L (rows, r), or (experts, rows, r).
        right: R (r, columns), or (experts, r, columns).
        shape: of the weight.
    """

    left: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return int(self.left.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of ΔW; of stacked experts a row is an expert."""
        right = self.right[start:stop] if self.right.dim() == 3 else self.right
        return (self.left[start:stop] @ right).view(stop - start, *self.shape[1:])

    def scaled(self, weight: float) -> Factors:
        """weight · ΔW."""
        return Factors(self.left * weight, self.right, self.shape)

    def matrices(self) -> list[tuple[Tensor, Tensor]]:
        """(L, R) of each matrix: one, or one for each expert."""
        if self.left.dim() == 2:
            return [(self.left, self.right)]
        return list(zip(self.left, self.right, strict=True))


@dataclass
class LowRank(Change):
    """W + L·R."""

    factors: Factors

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.factors.rows(start, start + len(rows)).to(rows.dtype))


@dataclass
class Direction(Change):
    """m∘(W + L·R) / ‖W + L·R‖ (DoRA, arXiv 2402.09353, eq. 5).

    Attributes:
        factors: of the update of the direction.
        magnitude: m, one for each output.
        outputs_are_rows: whether an output is a row of the weight, or a column of it.
    """

    factors: Factors
    magnitude: Tensor
    outputs_are_rows: bool
    _norm: Tensor | None = field(default=None, repr=False)

    def prepare(self, blocks: Blocks) -> None:
        if self.outputs_are_rows:
            return
        squares = torch.zeros(self.magnitude.numel(), dtype=torch.float64)
        for start, rows in blocks():
            squares += self._sum(rows, start).double().square().sum(0)
        self._norm = squares.sqrt()

    def apply(self, rows: Tensor, start: int) -> Tensor:
        total = self._sum(rows, start)
        if self.outputs_are_rows:
            norm = total.flatten(1).norm(dim=1)
            magnitude = self.magnitude[start : start + len(rows)].to(total.dtype)
            gain = _gain(magnitude, norm)
            return total.mul_(gain.view(-1, *(1 for _ in total.shape[1:])))
        assert self._norm is not None, "prepare comes first"
        return total.mul_(_gain(self.magnitude.to(total.dtype), self._norm.to(total.dtype)))

    def _sum(self, rows: Tensor, start: int) -> Tensor:
        return rows + self.factors.rows(start, start + len(rows)).to(rows.dtype)


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖·‖; 0 where a row is zero and has no direction."""
    return torch.where(norm > 0, magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@dataclass
class TokenRows(Change):
    """W with some rows replaced: tokens (k), their rows (k, …)."""

    tokens: Tensor
    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        inside = (self.tokens >= start) & (self.tokens < start + len(rows))
        return rows.index_copy_(0, self.tokens[inside] - start, self.values[inside].to(rows.dtype))


@dataclass
class Entries(Change):
    """W with single entries replaced: ascending flat positions (k), their values (k)."""

    indices: Tensor
    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        width = rows[0].numel() if len(rows) else 0
        first = start * width
        inside = (self.indices >= first) & (self.indices < first + rows.numel())
        flat = rows.contiguous().view(-1)
        flat.index_copy_(0, (self.indices[inside] - first).long(), self.values[inside].to(rows.dtype))
        return flat.view(rows.shape)


@dataclass
class Replaced(Change):
    """Another tensor in place of W; W need not exist."""

    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        values = self.values if self.values.dim() else self.values.view(1)
        return values[start : start + len(rows)].to(rows.dtype, copy=True)


@dataclass
class Added(Change):
    """b + c, for a bias on B that goes into the base layer's bias."""

    values: Tensor

    def apply(self, rows: Tensor, start: int) -> Tensor:
        return rows.add_(self.values[start : start + len(rows)].to(rows.dtype))
