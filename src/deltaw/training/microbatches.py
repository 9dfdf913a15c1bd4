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
    """Splits the rows of an optimizer step into microbatches. The split does not affect results.

    A row or a group of rows has ``label_count``, the number of labels that it adds to the summed loss. A microbatch is
    the input of one forward and backward pass. Its attributes are ``rows``, the number of rows, ``row_tokens``, the
    number of tokens of these rows, and ``tokens``, the number of tokens that are computed. Shared prefixes reduce
    ``tokens``, and padding increases it.

    If microbatches contain other rows than the input, the batcher also has ``cost_rows(rows)``. It returns the rows
    whose cost is used to distribute work over processes.
    """

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows, built lazily."""

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
    """Supplies the rows of a run to its model. This class feeds the first layer; subclasses can skip frozen layers.

    A feed is also a batcher. Its microbatches can contain outputs of frozen layers (:func:`enter_batch`).

    Attributes:
        objective: Computes the loss of its microbatches.
        batcher: Splits rows into microbatches.
        store: Stored outputs of frozen layers, or None.
    """

    def __init__(self, objective: AnyObjective, batcher: AnyBatcher, store: FeatureStore | None = None) -> None:
        self.objective, self.batcher, self.store = objective, batcher, store

    @property
    def share(self) -> bool:
        """True if shared prefixes are computed once."""
        return bool(getattr(self.batcher, "share", False))

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows, built lazily."""
        return self.batcher.batches(rows)

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch without building it."""
        return self.batcher.shapes(rows)

    def worst_case_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the largest rows that can reach the model for these rows of a step, for a dry run."""
        return rows

    def set_run_folder(self, folder: Path) -> None:
        """Set the run's folder, in which the feed stores files that a resumed run needs."""

    def cost_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the rows whose cost is used to distribute these rows over processes."""
        return getattr(self.batcher, "cost_rows", lambda same_rows: same_rows)(rows)

    def close(self) -> None:
        """Write stored outputs to disk and unlock the store for other runs."""
        if self.store is not None:
            self.store.close()


def enter_batch(batch: Any) -> AbstractContextManager[Any]:
    """Return a context manager that provides the batch for the model.

    Within the context, stored outputs replace the layers that would compute them. A batch without stored outputs is
    returned unchanged.
    """
    return contextlib.nullcontext(batch) if batch.enter is None else batch.enter()
