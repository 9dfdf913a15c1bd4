"""Curves made ready to be drawn: smoothed, thinned without losing a peak, with ticks at round numbers.

Knows numbers only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

# Places along a curve; each keeps its lowest and its highest value.
PLACES = 360
# Largest over smallest value from which a logarithmic scale is easier to read.
LOG_FROM = 25.0


def thinned(x: np.ndarray, y: np.ndarray, places: int = PLACES) -> tuple[np.ndarray, np.ndarray]:
    """At most two points for each place along the curve, its lowest and its highest, in their order; the
    first and the last point stay."""
    if len(x) <= 2 * places:
        return x, y
    cuts = np.linspace(0, len(x), places + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(cuts.tolist()):
        kept.add(start + int(np.argmin(y[start:end])))
        kept.add(start + int(np.argmax(y[start:end])))
    at = np.array(sorted(kept))
    return x[at], y[at]


def smoothed(y: np.ndarray, share: float = 0.02) -> np.ndarray:
    """A running mean whose memory is a share of the curve, at least four steps or an eighth of it, whichever
    is less; unbiased at its beginning."""
    if not len(y):
        return y
    keep = 1 - 1 / max(1.0, min(4.0, len(y) / 8), share * len(y))
    found = np.empty(len(y))
    mean = weight = 0.0
    for place, value in enumerate(y.tolist()):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        found[place] = mean / weight
    return found


def is_logarithmic(values: Sequence[float] | np.ndarray) -> bool:
    """Whether all values are positive and spread over more than :data:`LOG_FROM`."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    return bool(len(found) and found.min() > 0 and found.max() / found.min() > LOG_FROM)


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``: at most ``most``, at least one where the range is not empty."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten between two positive numbers; where they are few, also their double and fivefold."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [
            f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p * (1 + 1e-9) <= high * 1.001
        ]
        if len(ticks) <= most:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / most)]
    return ticks or [low]


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` places out of ``count``, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})
