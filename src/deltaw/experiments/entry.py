"""One method of a comparison: its settings, what is stored of it, and what is still to do.

It knows what is stored and starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.experiments.rates import best_rate, grid, next_rate


@dataclass
class Entry:
    """One method of the comparison.

    Attributes:
        piece: what is stored on disk: ``settings``, ``usual_rate``, ``rates`` (pairs of rate and loss) and
            ``runs``, by seed.
        asked: the rates to try; None for the grid around the usual one.
        error: why the method has no result.
    """

    method: str
    config: RunConfig
    asked: list[float] | None
    piece: dict[str, Any] = field(default_factory=dict)
    error: UserError | None = None

    @property
    def losses(self) -> dict[float, float]:
        """Validation loss by learning rate tried; infinite where training diverged."""
        pairs = self.piece.get("rates")
        return {
            float(rate): math.inf if loss is None else float(loss)
            for rate, loss in (pairs if isinstance(pairs, list) else [])
        }

    @property
    def planned(self) -> list[float] | None:
        """The rates to try; None until the usual one is known."""
        usual = self.piece.get("usual_rate")
        return self.asked or (grid(float(str(usual))) if usual is not None else None)

    @property
    def fixed(self) -> bool:
        """Whether the learning rate is given."""
        return self.asked is not None and len(self.asked) == 1

    def next_rate(self) -> float | None:
        if self.fixed or self.planned is None:
            return None
        return next_rate(self.planned, self.counted(), extend=self.asked is None)

    def chosen(self) -> float | None:
        if self.fixed and self.asked is not None:
            return self.asked[0]
        return best_rate(self.counted())

    def counted(self) -> dict[float, float]:
        """Losses of the rates in this comparison; rates that only an earlier one was given are ignored."""
        if self.asked is None:
            return self.losses
        return {rate: loss for rate, loss in self.losses.items() if rate in self.asked}

    def run(self, seed: int) -> dict[str, Any] | None:
        """What is stored of the final training with this seed, if it used the chosen rate."""
        runs = self.piece.get("runs")
        found = runs.get(str(seed)) if isinstance(runs, dict) else None
        return found if isinstance(found, dict) and found.get("learning_rate") == self.chosen() else None

    def runs(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """What is stored of the final trainings with these seeds, in their order."""
        return [found for seed in seeds if (found := self.run(seed)) is not None]

    def store(self, seed: int, found: dict[str, Any] | None) -> None:
        """Put the result of one seed among the others, or take it away."""
        runs = self.piece.get("runs")
        kept = dict(runs) if isinstance(runs, dict) else {}
        kept.pop(str(seed), None)
        self.piece["runs"] = kept if found is None else {**kept, str(seed): found}
