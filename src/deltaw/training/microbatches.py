"""How rows meet a model: microbatches, and the objective that turns one into a loss.

These protocols are all that the loop knows of data and models. Implementations: ``tasks/causal_batcher.py``
and ``data/images.py``; ``features/cached.py`` wraps either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor


class Labeled(Protocol):
    """A row of the data, or a group of rows that belong together."""

    @property
    def label_count(self) -> int:
        """Labels that it brings to the sum of losses."""
        ...


class MicroBatch(Protocol):
    """What one forward and backward sees.

    Attributes:
        rows: rows in it. row_tokens: tokens of all rows. tokens: tokens that are computed, which sharing
            makes fewer and padding more.
    """

    @property
    def rows(self) -> int: ...

    @property
    def row_tokens(self) -> int: ...

    @property
    def tokens(self) -> int: ...


Row = TypeVar("Row", bound=Labeled)
RowIn = TypeVar("RowIn", contravariant=True)
BatchOut = TypeVar("BatchOut", bound=MicroBatch, covariant=True)
BatchIn = TypeVar("BatchIn", contravariant=True)


class MicroBatcher(Protocol[RowIn, BatchOut]):
    """Cuts the rows of an optimizer step into microbatches. How it does so changes no result.

    One whose microbatches hold other rows than it is given also has ``costing(rows)``: by whose cost each of
    them is dealt where several processes train together.
    """

    def batches(self, rows: Sequence[RowIn]) -> Iterator[BatchOut]:
        """The microbatches of these rows, each laid out only when its turn comes."""
        ...

    def shapes(self, rows: Sequence[RowIn]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch, without laying any out."""
        ...


class Objective(Protocol[BatchIn]):
    """A model together with what it is trained to make small.

    One whose loss depends on a step's rows together also has ``begin(rows, batcher, processes)``, which is
    called with them before their microbatches come; ``processes`` deal rows and add up numbers where several
    train together (:class:`deltaw.training.parallel.reducer.Reducer`).
    """

    def __call__(self, batch: BatchIn) -> Tensor:
        """The sum of a microbatch's losses: a scalar that gradients flow from."""
        ...

    def units(self, rows: Sequence[Any]) -> int:
        """What the sum over these rows is divided by: labels of a cross-entropy, pairs of a loss of pairs."""
        ...


AnyBatcher = MicroBatcher[Any, Any]
AnyObjective = Objective[Any]
