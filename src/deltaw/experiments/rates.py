"""Which learning rates are tried for a method, and which of them is best.

The grid is the method's usual rate and a step to each side of it. Where the best lies at an end, one more
step is tried beyond it, once. Numbers alone: it knows no models and no methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from deltaw.errors import UserError, did_you_mean

# Neighbouring rates of a grid differ by this factor: half an order of magnitude.
STEP = 3.0


def grid(usual: float) -> list[float]:
    """The rates tried around a method's usual one, ascending."""
    return [_rounded(usual / STEP), _rounded(usual), _rounded(usual * STEP)]


def next_rate(planned: Sequence[float], losses: Mapping[float, float], *, extend: bool) -> float | None:
    """The rate to try next; None where all is known.

    Args:
        planned: the grid.
        losses: of the rates that were tried, infinite where training diverged. What diverges at one rate is
            not tried at higher ones.
        extend: whether a step beyond the end of the grid is tried where the best lies there.
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
    """The rate of the least loss; None where training diverged at all of them."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def parse_rates(given: Iterable[str], methods: Sequence[str]) -> dict[str, list[float]]:
    """``lora=1e-4,3e-4`` and its like as rates by method.

    Raises:
        UserError: no such form, a method that is not compared, or no number above zero.
    """
    rates: dict[str, list[float]] = {}
    for text in given:
        method, equals, numbers = text.partition("=")
        method = method.strip()
        if not equals or not numbers.strip():
            raise UserError(
                f"'{text}' does not say which rates a method is to try",
                where="--rates",
                hint="write METHOD=RATE,RATE, for example --rates lora=1e-4,3e-4",
            )
        if method not in methods:
            raise UserError(
                f"'{method}' is none of the methods that are compared",
                where="--rates",
                hint=did_you_mean(method, methods),
            )
        rates[method] = sorted({_rate(part.strip(), text) for part in numbers.split(",") if part.strip()})
    return rates


def _rate(text: str, whole: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1e6:
        raise UserError(
            f"'{text}' in '{whole}' is no learning rate", where="--rates", hint="give numbers above 0"
        )
    return rate


def _rounded(rate: float) -> float:
    """Two digits: as exact as a grid is meant."""
    return float(f"{rate:.2g}")
