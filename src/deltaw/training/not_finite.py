"""A step whose loss or gradient is not a finite number: what is known of it, and the error for it.

Knows numbers and rows by their place; where the numbers broke is found by
:mod:`deltaw.training.diagnosis`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from deltaw.errors import UserError

# With ``train.not_finite: skip`` a training ends once so many steps in a row had to be skipped: it has
# diverged, and would skip all others too.
MOST_IN_ROW = 10


@dataclass(frozen=True)
class NotFinite:
    """A step that changed nothing, since its loss or its gradient is infinite or not a number.

    Attributes:
        step: its number, from 1. total_steps: of the training.
        rows: (n,) its rows by their place in the data.
        loss, gradient_norm, learning_rate: as of :class:`deltaw.training.state.Step`.
    """

    step: int
    total_steps: int
    rows: np.ndarray
    loss: float
    gradient_norm: float
    learning_rate: float

    def as_dict(self) -> dict[str, object]:
        """Its line of ``metrics.jsonl``; JSON has no infinite numbers, so they are texts."""
        return {
            "step": self.step,
            "skipped": {"loss": f"{self.loss:g}", "gradient_norm": f"{self.gradient_norm:g}"},
            "learning_rate": self.learning_rate,
        }


# Asked what is wrong with a step's rows, while the model is as it was before the step; answers in lines.
Diagnose: TypeAlias = Callable[[NotFinite], Sequence[str]]


@dataclass(frozen=True)
class WhenNotFinite:
    """What a training does with such steps.

    Attributes:
        skip: leave them out, up to ``MOST_IN_ROW`` in a row; else the first ends the training.
        on_skip: told of one that is left out. diagnose: asked about one that ends the training.
    """

    skip: bool = False
    on_skip: Callable[[NotFinite], None] = lambda found: None
    diagnose: Diagnose = lambda found: ()


class NotFiniteError(UserError):
    """A training has diverged. The trained parameters are those before the step.

    Args:
        found: the step. lines: of the diagnosis. in_row: steps that were skipped just before.
    """

    def __init__(self, found: NotFinite, lines: Sequence[str] = (), in_row: int = 0) -> None:
        self.found = found
        again = f", after {in_row} steps in a row that were skipped" if in_row else ""
        what = f"training diverged: loss {found.loss:.3g}, gradient norm {found.gradient_norm:.3g}{again}"
        super().__init__(
            "\n".join([what, *(f"  {line}" for line in lines)]),
            where=f"step {found.step} of {found.total_steps}",
            hint="lower train.learning_rate, or lengthen train.warmup"
            + ("" if in_row else "; train.not_finite: skip leaves such steps out"),
        )
