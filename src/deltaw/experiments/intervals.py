"""Intervals of scores over seeds and rows together.

Every method is scored on the same rows with each of a few seeds, so seeds and rows are crossed, and both are
samples: of other trainings, and of other rows. The model is the two-way random-effects one,

    score of seed s on row r = mean + a_s + b_r + e_sr,

in which the variance of the mean over S seeds and R rows is σ²_a/S + σ²_b/R + σ²_e/(S·R). Each part is
estimated from the mean squares; a negative estimate counts as zero. The interval is the mean ± t·(standard
error), with Satterthwaite's degrees of freedom (Satterthwaite 1946, "An approximate distribution of estimates
of variance components"). This is how studies in which several readers read the same cases are evaluated
(Hillis 2007, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis").
With three seeds that differ much, the degrees of freedom are near 2 and t is near 4.3: few seeds give a wide
interval, which a bootstrap of three seeds would not (it takes two thirds of their variance, and no t).

The interval of a difference between two methods is that of the row-by-row, seed-by-seed differences.

It knows numbers alone.
"""

from __future__ import annotations

import math

import numpy as np

from deltaw.training.evaluation.metrics import Interval, bootstrap_interval

LEVEL = 0.95
# Beyond so many degrees of freedom, t is the normal distribution for every purpose here.
MANY = 1000.0


def interval_of(scores: np.ndarray, level: float = LEVEL) -> Interval:
    """The interval of the mean of ``scores``, (seeds, rows).

    With one seed it covers the choice of rows alone, by a bootstrap of rows.
    """
    seeds, rows = scores.shape
    if seeds == 1:
        return bootstrap_interval(scores[0], level=level)
    mean = float(scores.mean())
    of_seeds, of_rows, of_rest = mean_squares(scores)
    if rows == 1:
        total, freedom = of_seeds, seeds - 1.0
    else:
        total = max(of_seeds, of_rest) + max(of_rows - of_rest, 0.0)
        spread = of_seeds**2 / (seeds - 1) + of_rows**2 / (rows - 1) + of_rest**2 / ((seeds - 1) * (rows - 1))
        freedom = max(1.0, total**2 / spread) if spread else MANY
    half = t_quantile(level, freedom) * math.sqrt(total / (seeds * rows))
    return mean - half, mean + half


def mean_squares(scores: np.ndarray) -> tuple[float, float, float]:
    """Mean squares of seeds, of rows, and of what is left, of (seeds, rows); 0 where there is only one."""
    seeds, rows = scores.shape
    mean = scores.mean()
    by_seed = scores.mean(axis=1, keepdims=True) - mean
    by_row = scores.mean(axis=0, keepdims=True) - mean
    rest = scores - mean - by_seed - by_row
    return (
        float(rows * (by_seed**2).sum() / max(1, seeds - 1)),
        float(seeds * (by_row**2).sum() / max(1, rows - 1)),
        float((rest**2).sum() / max(1, (seeds - 1) * (rows - 1))),
    )


def t_quantile(level: float, freedom: float) -> float:
    """The bound t with P(|T| < t) = ``level`` for Student's T; the degrees of freedom may be a fraction.

    With T = √ν·tan θ the density becomes cos^(ν−1) θ, which is summed over a grid of angles.
    """
    freedom = min(freedom, MANY)
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(level * below[-1], below, angles)))
