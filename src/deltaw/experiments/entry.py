"""One method of a comparison: its settings, what is stored of it, and what is still to do.

It knows what is stored and starts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.runs.folder import mapping, sequence
from deltaw.settings import RunConfig

# Which learning rates are tried for a method, and which of them is best.
#
# The grid is the method's usual rate and one step to each side of it. If the best rate lies at an end of the
# grid, one more rate is tried beyond that end, once. This module works on numbers and knows no models.


# Ratio of neighboring rates in the grid: half an order of magnitude.
STEP = 3.0


def grid(usual: float) -> list[float]:
    """The rates tried around a method's usual one, in ascending order."""
    return [_rounded(usual / STEP), _rounded(usual), _rounded(usual * STEP)]


def next_rate(planned: Sequence[float], losses: Mapping[float, float], *, extend: bool) -> float | None:
    """The rate to try next; None if none is left.

    Args:
        planned: the grid.
        losses: validation loss by rate tried, infinite where training diverged. Rates above a diverging one
            are not tried.
        extend: whether to try one more rate beyond the grid if the best rate lies at its end.
    """
    broken = min((rate for rate, loss in losses.items() if math.isinf(loss)), default=math.inf)
    for rate in sorted(planned):
        if rate not in losses and rate < broken:
            return rate
    if not extend or set(losses) - set(planned):
        return None
    best = best_rate(losses)
    lowest, highest = min(planned), max(planned)
    if best is None or best == lowest:
        return _rounded(lowest / STEP)
    return _rounded(highest * STEP) if best == highest else None


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest loss; None if training diverged at all of them."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def parse_rates(given: Iterable[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """Parse ``lora=1e-4,3e-4`` into rates by method.

    Raises:
        UserError: the form is wrong, the method is not compared, or a rate is not above zero.
    """
    rates: dict[str, list[float]] = {}
    for text in given:
        method, equals, numbers = text.partition("=")
        method = method.strip()
        if not equals or not numbers.strip():
            hint = "write METHOD=RATE,RATE, for example --rates lora=1e-4,3e-4"
            raise UserError(f"'{text}' does not name a method and its rates", where="--rates", hint=hint)
        if method not in methods:
            what = f"'{method}' is not one of the methods that are compared"
            raise UserError(what, where="--rates", hint=did_you_mean(method, methods))
        rates[method] = sorted({_rate(part.strip(), text) for part in numbers.split(",") if part.strip()})
    return rates


def _rate(text: str, whole: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1e6:
        raise UserError(f"'{text}' in '{whole}' is not a learning rate", where="--rates", hint="give numbers above 0")
    return rate


def _rounded(rate: float) -> float:
    """Round to two significant digits."""
    return float(f"{rate:.2g}")


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
        pairs = sequence(self.piece.get("rates"))
        return {float(rate): math.inf if loss is None else float(loss) for rate, loss in pairs}

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
        return self.asked[0] if self.fixed and self.asked is not None else best_rate(self.counted())

    def counted(self) -> dict[float, float]:
        """Losses of the rates in this comparison; rates that only an earlier one was given are ignored."""
        if self.asked is None:
            return self.losses
        return {rate: loss for rate, loss in self.losses.items() if rate in self.asked}

    def run(self, seed: int) -> dict[str, Any] | None:
        """What is stored of the final training with this seed, if it used the chosen rate."""
        found = mapping(self.piece.get("runs")).get(str(seed))
        return found if isinstance(found, dict) and found.get("learning_rate") == self.chosen() else None

    def runs(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """What is stored of the final trainings with these seeds, in their order."""
        return [found for seed in seeds if (found := self.run(seed)) is not None]

    def store(self, seed: int, found: dict[str, Any] | None) -> None:
        """Put the result of one seed among the others, or take it away."""
        runs = {**mapping(self.piece.get("runs")), str(seed): found}
        self.piece["runs"] = {key: kept for key, kept in runs.items() if kept is not None}
