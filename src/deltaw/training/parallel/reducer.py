"""What the loop asks of the processes that train together; one process alone has nothing to ask.

The loop calls the same methods at the same places whatever their number, so it is read without thinking of
any. :class:`deltaw.training.parallel.group.Group` is the one for several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from deltaw.training.losses import Watched, unrounded
from deltaw.training.microbatches import AnyBatcher
from deltaw.training.state import TrainState

Parameters: TypeAlias = Sequence[nn.Parameter]


@dataclass
class StepSums:
    """Over the microbatches of a step: losses (on their device), tokens of the rows, tokens computed."""

    loss: Tensor
    row_tokens: int = 0
    tokens: int = 0

    def add(self, loss: Tensor, row_tokens: int, tokens: int) -> None:
        """Count one microbatch."""
        self.loss = self.loss + unrounded(loss)
        self.row_tokens += row_tokens
        self.tokens += tokens


@dataclass(frozen=True)
class Spare:
    """A microbatch that is computed without an effect, so that this process runs as many as the others."""

    of: Any


class Reducer:
    """One process: every answer is its own.

    Attributes:
        rank: this process's number, from 0. size: how many there are. local_rank, local_size: the same of
            this machine's, whose numbers follow each other.
    """

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def begin(self, state: TrainState) -> bool:
        """Let all begin with the state of process 0; whether that changed this one's."""
        return False

    def goes_on(self, state: TrainState, wanted: Callable[[], bool]) -> bool:
        """Whether there is another step: what ``wanted`` says in process 0."""
        return wanted()

    def deal(self, rows: Sequence[Any], batcher: AnyBatcher) -> Sequence[Any]:
        """This process's rows of a step, as ``batcher`` would cut them."""
        return rows

    def add(self, numbers: Tensor, *, patient: bool = False) -> Tensor:
        """Numbers summed over all processes; all ask for the same sums in the same order.

        Args:
            patient: whether the others may come much later, as before the first step.
        """
        return numbers

    def own_random_numbers(self, seed: int, step: int) -> None:
        """Called before each step's forward: process 0 keeps the random numbers of the training."""

    def stops(self, stopped: Callable[[], bool]) -> Callable[[], bool]:
        """What tells within a step whether it was asked to stop, from what tells it in this process."""
        return stopped

    def batches(self, batcher: AnyBatcher, own: Sequence[Any], rows: Sequence[Any]) -> Iterable[Any]:
        """The microbatches that this process computes in a step, some of which may be :class:`Spare`.

        Args:
            own: the rows that it was dealt, of all ``rows`` of the step.
        """
        return batcher.batches(own)

    def microbatches(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The microbatches of a step, for one that no other backward follows: gradients may travel while the
        last of them is computed."""
        return batches

    def texts(self, text: str) -> list[str]:
        """One text of each process, by their numbers; all ask for it together."""
        return [text]

    def total(self, parameters: Parameters, sums: StepSums | None, watched: Watched | None = None) -> StepSums | None:
        """Add up gradients and sums over all processes; each has them afterwards.

        Args:
            sums: this process's; None where it was asked to stop.
            watched: what counts beside the loss; afterwards it has counted the whole step.

        Returns:
            those of the whole step; None where any was asked to stop.
        """
        return sums

    def dismiss(self) -> None:
        """The run needs the others no more; in process 0."""


ALONE = Reducer()
