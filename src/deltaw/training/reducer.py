"""Interface between the training loop and the processes that train together.

:class:`Reducer` is the implementation for one process. :class:`deltaw.training.parallel.group.Group` is the one for
several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from deltaw.training.batcher import Batcher
from deltaw.training.losses import MetricAccumulator, detach_wide
from deltaw.training.state import TrainState

Parameters: TypeAlias = Sequence[nn.Parameter]


@dataclass
class StepSums:
    """Totals over the microbatches of a step: losses (on their device), tokens of the rows, computed tokens."""

    loss: Tensor
    row_tokens: int = 0
    tokens: int = 0

    def add(self, loss: Tensor, row_tokens: int, tokens: int) -> None:
        """Add a microbatch."""
        self.loss = self.loss + detach_wide(loss)
        self.row_tokens += row_tokens
        self.tokens += tokens


@dataclass(frozen=True)
class SpareBatch:
    """Microbatch that is computed without an effect, so that all processes run the same number of microbatches."""

    of: Any


class Reducer:
    """Implementation for a single process.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of processes.
        local_rank: Rank on this machine. Ranks of a machine are consecutive.
        local_size: Number of processes on this machine.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def broadcast_state(self, state: TrainState) -> bool:
        """Copy the state of process 0 to all processes. Returns True if this process's state changed."""
        return False

    def should_continue(self, state: TrainState, has_next_step: Callable[[], bool]) -> bool:
        """Return the result of ``has_next_step`` in process 0."""
        return has_next_step()

    def local_rows(self, rows: Sequence[Any], batcher: Batcher) -> Sequence[Any]:
        """Return this process's rows of a step."""
        return rows

    def add(self, numbers: Tensor, *, long_wait: bool = False) -> Tensor:
        """Return the sum over all processes. All processes call it in the same order.

        Args:
            numbers: Values of this process.
            long_wait: True if processes can arrive much later, as before the first step.
        """
        return numbers

    def seed_random_numbers(self, seed: int, step: int) -> None:
        """Seed each process differently before the forward passes of a step.

        Process 0 retains the training's random numbers.
        """

    def agree_on_stop(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Return a function that is True within a step if the training was stopped, given the one of this process."""
        return should_stop

    def batches(self, batcher: Batcher, local_rows: Sequence[Any], rows: Sequence[Any]) -> Iterable[Any]:
        """Return the microbatches that this process computes in a step, possibly with :class:`SpareBatch`.

        Args:
            batcher: Splits rows into microbatches.
            local_rows: Rows of this process.
            rows: All rows of the step.
        """
        return batcher.batches(local_rows)

    def microbatches(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Return the microbatches of a step that no other backward pass follows.

        Gradients can be sent during the backward pass of the last one.
        """
        return batches

    def texts(self, text: str) -> list[str]:
        """Return the texts of all processes by rank. All processes call it together."""
        return [text]

    def total(
        self, parameters: Parameters, sums: StepSums | None, accumulator: MetricAccumulator | None = None
    ) -> StepSums | None:
        """Sum gradients and totals over all processes. Each process receives the result.

        Args:
            parameters: Trained parameters with gradients.
            sums: Totals of this process, or None if it was stopped.
            accumulator: Metrics of this process. It is updated to the metrics of the entire step.

        Returns:
            Totals of the entire step, or None if any process was stopped.
        """
        return sums

    def dismiss(self) -> None:
        """Let the remaining processes exit. Called in process 0."""


SINGLE_PROCESS = Reducer()
