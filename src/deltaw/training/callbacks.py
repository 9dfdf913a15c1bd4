"""What a caller wants to see of a run, or do while it goes on: one class whose methods all do nothing.

A run never prints. It tells its callback, and a caller overrides the methods that it needs. The command line
has one that draws on a terminal (:mod:`deltaw.reports.progress`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deltaw.memory.plan import Plan
    from deltaw.training.evaluation.base import Evaluation
    from deltaw.training.monitoring.rate_curve import RateSearch
    from deltaw.training.monitoring.written_answers import Sample
    from deltaw.training.state import Outcome, Step, TrainState

# Told one line of text that a person may want to read.
Say: TypeAlias = Callable[[str], None]


def silent(line: str) -> None:
    """Tell nobody."""


class Callback:
    """Told of what a run does, in the order of the methods below. An exception ends the run."""

    def on_line(self, line: str) -> None:
        """A choice, a note or an account of the rows, in words."""

    def on_plan(self, plan: Plan, limit_bytes: int) -> None:
        """The memory that the run will need, and the bytes that the machine gives; not where no plan can be
        made."""

    def on_rate_search(self, search: RateSearch, folder: Path) -> None:
        """A learning rate was found by a range test; ``folder`` is the run's, which holds the numbers."""

    def on_begin(self, state: TrainState) -> None:
        """The first step is about to begin. ``state`` stays current: ``state.state()`` is what a later run
        continues from."""

    def on_step(self, step: Step) -> None:
        """An optimizer step is done. The time that this takes is not counted as training."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """The held-out rows were evaluated after so many steps."""

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The model's answers to a few held-out prompts after so many steps; at step 0 the base model's."""

    def should_stop(self) -> bool:
        """Asked after each microbatch. True ends the run as Ctrl-C does: the adapter as of the last whole
        step is saved."""
        return False

    def on_end(self, outcome: Outcome | None) -> None:
        """No further step comes; ``outcome`` is None where an error ended the training."""


class Lines(Callback):
    """Hands a run's lines to a function, such as ``print``; the plan is not among them."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def on_line(self, line: str) -> None:
        self._say(line)
