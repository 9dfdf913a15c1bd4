"""Interface of an objective: the summed loss of a microbatch."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deltaw.training.batcher import Batcher
from deltaw.training.losses import MetricAccumulator
from deltaw.training.reducer import Reducer


class Objective(abc.ABC):
    """A model with its loss function.

    Attributes:
        model: The model.
        accumulator: Metrics that the microbatches of a step accumulate, or None.
        chunked: False if the logits of all labels of a microbatch are in memory at the same time.
        min_rough_rows: With fewer labels per chunk, logits are never approximated.
    """

    model: Any
    accumulator: MetricAccumulator | None = None
    chunked: bool = True
    min_rough_rows: int = 0

    @property
    def chunk(self) -> int:
        """Number of labels per chunk of logits."""
        return 1

    @property
    def approximable(self) -> tuple[str, ...]:
        """Names of the applicable ``APPROXIMATIONS`` of the head."""
        return ()

    @abc.abstractmethod
    def __call__(self, batch: Any) -> Tensor:
        """Return the summed loss of a microbatch, a differentiable scalar."""

    @abc.abstractmethod
    def units(self, rows: Sequence[Any]) -> int:
        """Return the divisor of the summed loss, for example the number of labels or pairs."""

    def evaluate_rows(self, batch: Any) -> Any:
        """Return the values of a microbatch that an evaluation needs. It is called without gradients.

        A plan runs it to measure the memory of evaluations.
        """
        return self(batch)

    def start_step(self, rows: Sequence[Any], batcher: Batcher, processes: Reducer) -> None:  # noqa: B027
        """Prepare the loss of a step, if it depends on all rows of the step.

        Args:
            rows: All rows of the step.
            batcher: Splits rows into microbatches.
            processes: Distributes rows and adds values over processes.
        """

    def cached_passes(self, shapes: Sequence[tuple[int, int]]) -> int | None:
        """Return the number of leading microbatches whose activations :meth:`start_step` stores, or None."""
        return None
