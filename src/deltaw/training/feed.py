"""Supply of a model with the rows of a run, with or without stored outputs of frozen layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.training.batcher import Batcher
from deltaw.training.objective import Objective

if TYPE_CHECKING:
    from deltaw.training.features.store import FeatureStore


class Feed(Batcher):
    """Supplies the rows of a run to its model. This class feeds the first layer; subclasses can skip frozen layers.

    A feed is also a batcher. Its microbatches can contain outputs of frozen layers (:func:`enter_batch`).

    Attributes:
        objective: Computes the loss of its microbatches.
        batcher: Splits rows into microbatches.
        store: Stored outputs of frozen layers, or None.
        generates_rows: True if the rows of a step are generated before it.
        steps_per_round: Number of steps for which generated rows are used.
        extremes: Best and worst generated rows of the last round, each with a method ``as_dict``, for reports.
    """

    generates_rows = False
    steps_per_round = 1
    extremes: Sequence[Any] = ()

    def __init__(self, objective: Objective, batcher: Batcher, store: FeatureStore | None = None) -> None:
        self.objective = objective
        self.batcher = batcher
        self.store = store
        self.tokens_per_pass = batcher.tokens_per_pass
        self.padded = batcher.padded
        self.share = batcher.share
        self.independent = batcher.independent

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        return self.batcher.batches(rows)

    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        return self.batcher.shapes(rows)

    def cost_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        return self.batcher.cost_rows(rows)

    def worst_case_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the largest rows that can reach the model for these rows of a step, for a dry run."""
        return rows

    def with_answers(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return rows with the answers that the run trains on."""
        return rows

    def set_run_folder(self, folder: Path) -> None:
        """Set the run's folder, in which the feed stores files that a resumed run needs."""

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
