"""Interfaces between rows and models: batchers, objectives and feeds.

The loop uses data and models only through these protocols. Batchers are in ``tasks/causal_batcher.py`` and
``data/images.py``. Feeds with cached outputs of frozen layers are in ``features``.
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
    """Splits the rows of an optimizer step into microbatches. The split does not change results.

    A row or a group of rows has ``label_count``, the number of labels that it adds to the summed loss. A microbatch is
    the input of one forward and backward pass. It has ``rows``, the number of its rows, ``row_tokens``, the number of
    their tokens, and ``tokens``, the number of computed tokens. Shared prefixes reduce ``tokens``, padding increases
    it.

    A batcher whose microbatches contain other rows than its input also has ``cost_rows(rows)``. These rows determine
    the cost when rows are distributed to processes.
    """

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows. Each is built when it is requested."""

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch without building it."""


class AnyObjective(Protocol):
    """A model with its loss function.

    If the loss depends on all rows of a step, the objective also has ``start_step(rows, batcher, processes)``, which is
    called with them before their microbatches. ``processes`` distributes rows and adds values over several processes
    (:class:`deltaw.training.parallel.reducer.Reducer`).
    """

    def __call__(self, batch: Any) -> Tensor:
        """Return the summed loss of a microbatch, a differentiable scalar."""

    def units(self, rows: Sequence[Any]) -> int:
        """Return the divisor of the summed loss, for example the number of labels or pairs."""


class Feed:
    """Supplies the rows of a run to its model. This class starts at the first layer.

    A feed is also a batcher. Its microbatches can contain outputs of frozen layers (:func:`enter_batch`).

    Attributes:
        objective: Computes the loss of its microbatches.
        batcher: Splits rows into microbatches.
        store: Stored outputs of frozen layers, if any.
    """

    def __init__(self, objective: AnyObjective, batcher: AnyBatcher, store: FeatureStore | None = None) -> None:
        self.objective, self.batcher, self.store = objective, batcher, store

    @property
    def share(self) -> bool:
        """True if shared prefixes are computed once."""
        return bool(getattr(self.batcher, "share", False))

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows. Each is built when it is requested."""
        return self.batcher.batches(rows)

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch without building it."""
        return self.batcher.shapes(rows)

    def worst_case_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the largest rows that the model can receive for these rows of a step, for a dry run."""
        return rows

    def set_run_folder(self, folder: Path) -> None:
        """Receive the run's folder, for files that a resumed run needs."""

    def cost_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return rows with the cost of the given ones, for distribution to processes."""
        return getattr(self.batcher, "cost_rows", lambda same_rows: same_rows)(rows)

    def close(self) -> None:
        """Write stored outputs to disk and release them for other runs."""
        if self.store is not None:
            self.store.close()


def enter_batch(batch: Any) -> AbstractContextManager[Any]:
    """Enter the batch as the model runs it, with stored outputs in place of the layers that compute them.

    If the batch has no stored outputs, it is unchanged.
    """
    return contextlib.nullcontext(batch) if batch.enter is None else batch.enter()
