"""What an evaluation of held-out rows comes to: metrics, and the one that methods are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """

    metrics: dict[str, float] = field(default_factory=dict)
    main: str = ""
    higher_is_better: bool = True
    per_row: np.ndarray | None = None
    interval: tuple[float, float] | None = None
    classes: Sequence[str] = ()
    confusion: np.ndarray | None = None
    predicted: Sequence[tuple[np.ndarray, np.ndarray]] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, object]:
        """The metrics, ready for JSON, which has no nan: null."""
        return {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}

    def score(self) -> dict[str, object] | None:
        """The main metric with its interval, ready for JSON; None where nothing was evaluated."""
        if not self.metrics:
            return None
        interval = None if self.interval is None else [float(bound) for bound in self.interval]
        return {"metric": self.main, "value": self.as_dict()[self.main], "interval": interval}


def mean_interval(per_row: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval of a mean over rows at 95 %, by resampling rows."""
    return bootstrap_interval(per_row, seed=seed, level=LEVEL)
