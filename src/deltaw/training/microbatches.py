"""How rows reach a model: microbatches, the objective that turns one into a loss, and the feed of both.

These protocols are all that the loop knows of data and models. Batchers are in ``tasks/causal_batcher.py`` and
``data/images.py``. Feeds that keep what frozen layers give are in ``features``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from deltaw.training.features.store import FeatureStore


class AnyBatcher(Protocol):
    """Cuts the rows of an optimizer step into microbatches. How it does so changes no result.

    A row, or a group of rows that belong together, has ``label_count``: labels that it brings to the sum of losses.
    A microbatch, which one forward and backward sees, has ``rows``: how many are in it, ``row_tokens``: tokens of all
    of them, and ``tokens``: those that are computed, which sharing makes fewer and padding more.

    One whose microbatches hold other rows than it is given also has ``costing(rows)``: by whose cost each of
    them is dealt where several processes train together.
    """

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """The microbatches of these rows, each laid out only when its turn comes."""

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch, without laying any out."""


class AnyObjective(Protocol):
    """A model together with what it is trained to make small.

    One whose loss depends on a step's rows together also has ``begin(rows, batcher, processes)``, which is
    called with them before their microbatches come; ``processes`` deal rows and add up numbers where several
    train together (:class:`deltaw.training.parallel.reducer.Reducer`).
    """

    def __call__(self, batch: Any) -> Tensor:
        """The sum of a microbatch's losses: a scalar that gradients flow from."""

    def units(self, rows: Sequence[Any]) -> int:
        """What the sum over these rows is divided by: labels of a cross-entropy, pairs of a loss of pairs."""


class Feed:
    """How the rows of a run reach its model; here from the first layer on.

    A feed is a batcher too. Its microbatches may bring what frozen layers would compute (:func:`entered`).

    Attributes:
        objective: runs its microbatches. batcher: cuts rows into microbatches.
        store: where outputs of frozen layers are kept; None where they are not.
    """

    def __init__(self, objective: AnyObjective, batcher: AnyBatcher, store: FeatureStore | None = None) -> None:
        self.objective, self.batcher, self.store = objective, batcher, store

    @property
    def share(self) -> bool:
        """Whether shared prefixes are computed once."""
        return bool(getattr(self.batcher, "share", False))

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """The microbatches of these rows, each laid out only when its turn comes."""
        return self.batcher.batches(rows)

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """(rows, length) of each microbatch, without laying any out."""
        return self.batcher.shapes(rows)

    def longest(self, rows: Sequence[Any]) -> Sequence[Any]:
        """What the rows of a step are at most when they reach the model, for a dry run."""
        return rows

    def keep_in(self, folder: Path) -> None:
        """Be told the run's folder, for what a run that is stopped must find again."""

    def costing(self, rows: Sequence[Any]) -> Sequence[Any]:
        """By whose cost each of the rows is dealt where several processes train together."""
        return getattr(self.batcher, "costing", lambda given: given)(rows)

    def close(self) -> None:
        """Bring what is kept to the disk, and let other runs have it."""
        if self.store is not None:
            self.store.close()


def entered(batch: Any) -> AbstractContextManager[Any]:
    """The batch as the model runs it. While open, what is kept takes the place of the layers that would compute
    it; where nothing is kept, the batch is as it was."""
    return contextlib.nullcontext(batch) if batch.enter is None else batch.enter()
