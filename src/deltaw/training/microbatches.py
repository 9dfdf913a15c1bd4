"""Interfaces between rows and models: batchers, objectives, feeds, and the reducer that combines processes.

The loop uses data and models only through these classes. Batchers are in ``training/batchers.py``, and feeds with
cached outputs of frozen layers in ``features``.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from deltaw.training.losses import MetricAccumulator, detach_wide
from deltaw.training.state import TrainState

if TYPE_CHECKING:
    from deltaw.training.features.store import FeatureStore


class Batcher(abc.ABC):
    """Splits the rows of an optimizer step into microbatches. The split changes results only by rounding.

    A row or a group of rows has ``label_count``, the number of labels that it adds to the summed loss. A microbatch,
    usually a :class:`deltaw.data.packing.MicroBatch`, is the input of one forward and backward pass. Shared prefixes
    reduce its number of computed tokens, and padding increases it.

    Attributes:
        tokens_per_pass: Maximum number of tokens per microbatch.
        padded: True if rows are padded instead of packed.
        share: True if shared prefixes are computed once.
        independent: True if packed rows share no prefixes because the model attends in both directions.
        step_metrics: Metrics that :meth:`expand` computed for the step.
    """

    tokens_per_pass: int
    padded: bool = True
    share: bool = False
    independent: bool = False
    step_metrics: Mapping[str, float] = MappingProxyType({})

    @abc.abstractmethod
    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        """Yield the microbatches of these rows, built lazily."""

    @abc.abstractmethod
    def shapes(self, rows: Sequence[Any]) -> list[tuple[int, int]]:
        """Return (rows, length) of each microbatch without building it."""

    def cost_rows(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Return the rows whose cost is used to distribute these rows over processes."""
        return rows

    def head_rows(self, rows: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> list[int]:
        """Return the number of rows that a head is applied to in each microbatch, given the :meth:`shapes`."""
        return [count for count, _ in shapes]

    def expand(self, rows: Sequence[Any], step: int) -> tuple[Sequence[Any], bool]:
        """Return the rows to train on in this step, and True if their loss has a gradient.

        Batchers that generate rows, for example completions of prompts, return new rows
        (:class:`deltaw.training.rollouts.RolloutFeed`).
        """
        return rows, True


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
        self.objective, self.batcher, self.store = objective, batcher, store
        self.tokens_per_pass, self.padded = batcher.tokens_per_pass, batcher.padded
        self.share, self.independent = batcher.share, batcher.independent

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


# Interface between the training loop and the processes that train together. :class:`Reducer` is the implementation for
# one process. :class:`deltaw.training.parallel.group.Group` is the one for several processes.


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
