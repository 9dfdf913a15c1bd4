"""The curve of a learning-rate range test, and the rate that is read off it.

Range test: L. N. Smith, "Cyclical Learning Rates for Training Neural Networks", arXiv 1506.01186, 3.3.
Knows numbers; not how they came about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

# Width of the smoothing, in steps of the test: the losses of neighboring steps are of different rows.
SMOOTHING = 2.0
# The curve is level up to the rate at which the smoothed loss has risen again by this share of its fall.
# Where it is lowest before that is chance. The rate that is chosen lies so many times below that end.
LEVEL, BELOW_END = 0.05, 5.0
# A fall from the mean of the first losses to the lowest smoothed one is noise up to so many standard
# deviations of single losses. The lowest of some ten independent means lies half a one below by chance.
NOISE, FIRST = 2.0, 5


@dataclass(frozen=True)
class RateSearch:
    """What a range test came to.

    Attributes:
        rates, losses: of each step, until the loss ran away.
        smoothed: the losses, smoothed over steps; those that run away count as much as they may fall.
        lowest: the rate of the lowest smoothed loss. steepest: that where it falls fastest before. end: the
            highest one at which it is still about as low.
        chosen, why: the rate for the training.
        usual: the method's usual rate, for comparison.
        diverged: whether the loss ran away before the highest rate.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    lowest: float | None
    steepest: float | None
    end: float | None
    chosen: float
    why: str
    usual: float
    diverged: bool

    def as_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)


def read_curve(
    rates: Sequence[float], losses: Sequence[float], *, usual: float, diverged: bool
) -> RateSearch:
    """The rate that a range test's curve speaks for.

    It is a fifth of the highest rate at which the smoothed loss is about as low as anywhere. Beyond that end
    a rate does harm within a few steps, and a whole training, whose steps add up, wants less. Where the loss
    does not fall by more than its noise, the curve says nothing, and the method's usual rate is taken.

    Args:
        rates, losses: of each step, in rising order of rates.
        usual: the method's usual rate.
        diverged: whether the loss ran away after the last of them.
    """
    # One loss that runs away would hide all that its neighbors say.
    first = sum(losses[:FIRST]) / FIRST
    most = 2.0 * first - min(losses, default=0.0)
    bounded = [min(loss, most) for loss in losses]
    smoothed = smooth(bounded)
    told = {"rates": list(rates), "losses": list(losses), "smoothed": smoothed, "diverged": diverged}
    at = int(np.argmin(smoothed)) if smoothed else 0
    fall = first - smoothed[at] if smoothed else 0.0
    if at < FIRST or fall <= NOISE * _noise(bounded, smoothed):
        why = "the method's usual rate: in the range test the loss fell by no more than its noise"
        return RateSearch(**told, lowest=None, steepest=None, end=None, chosen=usual, why=why, usual=usual)  # type: ignore[arg-type]
    logs = np.log(np.asarray(rates))
    slopes = np.gradient(np.asarray(smoothed), logs)
    steepest = float(rates[int(np.argmin(slopes[: at + 1]))])
    level = smoothed[at] + LEVEL * fall
    end = next((n - 1 for n in range(at, len(smoothed)) if smoothed[n] > level), len(smoothed) - 1)
    chosen = float(f"{rates[end] / BELOW_END:.2g}")
    edge = ", the highest rate tried" if end == len(rates) - 1 and not diverged else ""
    why = (
        f"range test: a fifth of the highest rate at which the loss is still low, {rates[end]:.2g}{edge}; "
        f"usual for the method is {usual:.2g}"
    )
    return RateSearch(
        **told,  # type: ignore[arg-type]
        lowest=float(rates[at]),
        steepest=steepest,
        end=float(rates[end]),
        chosen=chosen,
        why=why,
        usual=usual,
    )


def smooth(losses: Sequence[float]) -> list[float]:
    """Each loss averaged with its neighbors, weighted by a normal distribution over their distance.

    At both ends, where neighbors are missing on one side, a line is fitted instead of a mean, which would lag
    behind a slope.
    """
    values = np.asarray(losses, dtype=np.float64)
    places = np.arange(len(values), dtype=np.float64)
    smoothed = []
    for place in places:
        away = places - place
        weights = np.exp(-0.5 * (away / SMOOTHING) ** 2)
        total, first, second = weights.sum(), (weights * away).sum(), (weights * away**2).sum()
        determinant = total * second - first**2
        if determinant <= 0:
            smoothed.append(float(values[int(place)]))
            continue
        mean, slope = (weights * values).sum(), (weights * away * values).sum()
        smoothed.append(float((second * mean - first * slope) / determinant))
    return smoothed


def _noise(losses: Sequence[float], smoothed: Sequence[float]) -> float:
    """Standard deviation of single losses, by how they scatter around the smoothed ones.

    The median tells it, since losses that run away at the end are no noise.
    """
    off = np.abs(np.asarray(losses) - np.asarray(smoothed))
    own = 1.0 / (SMOOTHING * math.sqrt(2 * math.pi))  # a loss's share of its own smoothed one
    squares = 1.0 / (SMOOTHING * 2.0 * math.sqrt(math.pi))  # the sum of all squared shares
    return float(1.4826 * np.median(off) / math.sqrt(1.0 - 2.0 * own + squares))
