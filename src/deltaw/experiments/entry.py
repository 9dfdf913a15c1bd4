"""A method of a comparison: its settings, stored results and remaining work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deltaw.errors import UserError, did_you_mean
from deltaw.runs.folder import mapping, sequence
from deltaw.settings.config import RunConfig

# Request to a worker process, or its answer.
Message: TypeAlias = Mapping[str, object]

# Learning-rate search: the grid is the method's default rate and its two neighbors. If the best rate is at an end of
# the grid, one more rate is tried beyond that end.


# Ratio of neighboring rates in the grid: half an order of magnitude.
STEP = 3.0


def rate_grid(default_rate: float) -> list[float]:
    """Return the rates around a method's default rate in ascending order."""
    return [_round_rate(default_rate / STEP), _round_rate(default_rate), _round_rate(default_rate * STEP)]


def next_rate(planned: Sequence[float], losses: Mapping[float, float], *, extend: bool) -> float | None:
    """Return the next rate to try, or None.

    Args:
        planned: The grid.
        losses: Validation loss by tried rate, infinite if training diverged. Higher rates than a diverging one are not
            tried.
        extend: Try one more rate beyond the grid if the best rate is at its end.
    """
    broken = min((rate for rate, loss in losses.items() if math.isinf(loss)), default=math.inf)
    for rate in sorted(planned):
        if rate not in losses and rate < broken:
            return rate
    if not extend or set(losses) - set(planned):
        return None
    best = best_rate(losses)
    lowest = min(planned)
    highest = max(planned)
    if best is None or best == lowest:
        return _round_rate(lowest / STEP)
    return _round_rate(highest * STEP) if best == highest else None


def best_rate(losses: Mapping[float, float]) -> float | None:
    """Return the rate with the lowest loss, or None if training diverged at all rates."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def parse_rates(texts: Iterable[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """Parse ``lora=1e-4,3e-4`` into rates by method.

    Raises:
        UserError: If the format is invalid, the method is not compared, or a rate is not positive.
    """
    rates: dict[str, list[float]] = {}
    for text in texts:
        method, equals, numbers = text.partition("=")
        method = method.strip()
        if not equals or not numbers.strip():
            hint = "write METHOD=RATE,RATE, for example --rates lora=1e-4,3e-4"
            raise UserError(f"'{text}' does not name a method and its rates", location="--rates", hint=hint)
        if method not in methods:
            message = f"'{method}' is not one of the compared methods"
            raise UserError(message, location="--rates", hint=did_you_mean(method, methods))
        rates[method] = sorted({_rate(part.strip(), text) for part in numbers.split(",") if part.strip()})
    return rates


def _rate(text: str, flag: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1e6:
        raise UserError(f"'{text}' in '{flag}' is not a learning rate", location="--rates", hint="give numbers above 0")
    return rate


def _round_rate(rate: float) -> float:
    """Round to two significant digits."""
    return float(f"{rate:.2g}")


@dataclass
class ComparedMethod:
    """Method of a comparison.

    Attributes:
        method: Name of the method.
        config: Settings of its runs.
        requested_rates: Learning rates to try, or None for the grid around the default rate.
        piece: Stored values: ``settings``, ``usual_rate``, ``rates`` (pairs of rate and loss) and ``runs`` by seed.
        error: Reason for a missing result.
    """

    method: str
    config: RunConfig
    user_rates: list[float] | None
    piece: dict[str, Any] = field(default_factory=dict)
    error: UserError | None = None

    @property
    def losses(self) -> dict[float, float]:
        """Validation loss by tried learning rate, infinite if training diverged."""
        pairs = sequence(self.piece.get("rates"))
        return {float(rate): math.inf if loss is None else float(loss) for rate, loss in pairs}

    @property
    def planned(self) -> list[float] | None:
        """Rates to try, or None until the default rate is known."""
        default_rate = self.piece.get("usual_rate")
        return self.user_rates or (rate_grid(float(str(default_rate))) if default_rate is not None else None)

    @property
    def fixed(self) -> bool:
        """True if a single learning rate was given."""
        return self.user_rates is not None and len(self.user_rates) == 1

    def next_rate(self) -> float | None:
        if self.fixed or self.planned is None:
            return None
        return next_rate(self.planned, self.comparable_losses(), extend=self.user_rates is None)

    def chosen(self) -> float | None:
        return self.user_rates[0] if self.fixed and self.user_rates is not None else best_rate(self.comparable_losses())

    def comparable_losses(self) -> dict[float, float]:
        """Return the losses of the rates in this comparison, ignoring rates of an earlier one."""
        if self.user_rates is None:
            return self.losses
        return {rate: loss for rate, loss in self.losses.items() if rate in self.user_rates}

    def run(self, seed: int) -> dict[str, Any] | None:
        """Return the stored result of the final training with this seed if it used the chosen rate."""
        result = mapping(self.piece.get("runs")).get(str(seed))
        return result if isinstance(result, dict) and result.get("learning_rate") == self.chosen() else None

    def runs(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """Return the stored results of the final trainings with these seeds, in order."""
        return [result for seed in seeds if (result := self.run(seed)) is not None]

    def store(self, seed: int, result: dict[str, Any] | None) -> None:
        """Store or remove the result of a seed."""
        runs = {**mapping(self.piece.get("runs")), str(seed): result}
        self.piece["runs"] = {key: stored for key, stored in runs.items() if stored is not None}
