"""What an evaluation of held-out rows comes to: metrics, and the one that methods are compared by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deltaw.training.evaluation.metrics import bootstrap_interval

LEVEL = 0.95


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation.

    Attributes:
        metrics: every metric by name; empty where there was nothing to evaluate.
        main: the name of the one that counts; ``higher_is_better`` says which way.
        per_row: (rows,) that metric row by row, so that its mean is the metric; None where it has no such
            form (a correlation).
        interval: the interval of ``main`` at 95 %, by resampling rows.
        classes: their names, where there are any; ``confusion`` counts (true, predicted) in their order.
        predicted: for each row with an answer, as ``per_row`` has them, int64 (labels,) the likeliest token
            at each of its labels, and the labels themselves; empty where the model writes no text.
        name: of the set of rows, where it has one. others: the evaluations of further sets, by name.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    main: str = ""
    higher_is_better: bool = True
    per_row: np.ndarray | None = None
    interval: tuple[float, float] | None = None
    classes: Sequence[str] = ()
    confusion: np.ndarray | None = None
    predicted: Sequence[tuple[np.ndarray, np.ndarray]] = field(default=(), repr=False)
    name: str = ""
    others: Mapping[str, Evaluation] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The metrics, ready for JSON, which has no nan: null. Of several sets, those of each by its name."""
        own: dict[str, object] = {
            name: value if math.isfinite(value) else None for name, value in self.metrics.items()
        }
        if not self.name:
            return own
        return {self.name: own, **{name: other.as_dict() for name, other in self.others.items()}}

    def named_metrics(self) -> dict[str, float]:
        """The metrics of all sets in one, for a person: those of a set with a name begin with it."""
        prefix = f"{self.name} " if self.name else ""
        named = {f"{prefix}{key}": value for key, value in self.metrics.items()}
        for set_name, other in self.others.items():
            named |= {f"{set_name} {key}": value for key, value in other.metrics.items()}
        return named

    def score(self) -> dict[str, object] | None:
        """The main metric with its interval, ready for JSON; None where nothing was evaluated."""
        if not self.metrics:
            return None
        interval = None if self.interval is None else [float(bound) for bound in self.interval]
        value = self.metrics[self.main]
        return {
            "metric": self.main,
            "value": value if math.isfinite(value) else None,
            "interval": interval,
        }


def mean_interval(per_row: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean over rows at 95 %, by resampling rows."""
    return bootstrap_interval(per_row, seed=seed, level=LEVEL)
