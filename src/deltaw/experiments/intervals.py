"""Intervals of scores over seeds and rows.

All methods are scored on the same rows with each seed, so seeds and rows are crossed random factors:

score of seed s on row r = mean + a_s + b_r + e_sr

The variance of the mean over S seeds and R rows is σ²_a/S + σ²_b/R + σ²_e/(S·R). Each component is estimated from the
mean squares, with negative estimates set to zero. The interval is the mean ± t·(standard error) with Satterthwaite's
degrees of freedom (Satterthwaite 1946, "An approximate distribution of estimates of variance components"), as in
multi-reader studies (Hillis 2007, "A comparison of denominator degrees of freedom methods for multiple observer ROC
analysis"). Three seeds that differ much result in about 2 degrees of freedom and t near 4.3. A bootstrap would
underestimate this interval, because it uses two thirds of the variance of three seeds and no t.

A share of rows has Wilson's interval for the number of independent rows with the same variance.

Differences between two methods use the differences per row and seed. For shares, half a row is added to each of the
four cells (Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions"), so that
agreement on a small number of rows does not imply equality.
"""

from __future__ import annotations

import math

import numpy as np

from deltaw.training.evaluation.base import (
    CONFIDENCE,
    MAX_FREEDOM,
    Interval,
    mean_interval,
    t_quantile,
    wilson_interval,
)


def random_effects_interval(scores: np.ndarray, level: float = CONFIDENCE, *, share: bool = False) -> Interval | None:
    """Return the interval of the mean of ``scores`` (seeds, rows), or None for a single score.

    With one seed, it covers only the sampling of rows.

    Args:
        share: The mean is a share of rows.
    """
    seeds, rows = scores.shape
    if seeds == 1:
        return mean_interval(scores[0], share=share, level=level)
    mean = float(scores.mean())
    by_seed, by_row, residual = mean_squares(scores)
    if rows == 1:
        total = by_seed
        freedom = seeds - 1.0
    else:
        total = max(by_seed, residual) + max(by_row - residual, 0.0)
        spread = by_seed**2 / (seeds - 1) + by_row**2 / (rows - 1) + residual**2 / ((seeds - 1) * (rows - 1))
        freedom = max(1.0, total**2 / spread) if spread else MAX_FREEDOM
    variance = total / (seeds * rows)
    if share:
        count = min(seeds * rows, mean * (1 - mean) / variance) if variance else rows
        return wilson_interval(mean, count, level=level, freedom=freedom)
    half_width = t_quantile(level, freedom) * math.sqrt(variance)
    return mean - half_width, mean + half_width


def difference_interval(differences: np.ndarray, *, share: bool) -> Interval | None:
    """Return the interval of the mean of ``differences`` (seeds, rows) between two methods on the same rows."""
    if not share:
        return random_effects_interval(differences)
    pseudo = np.tile(math.sqrt(0.5) * np.array([[1.0, -1.0]]), (len(differences), 1))
    bounds = random_effects_interval(np.hstack([differences, pseudo]))
    return bounds and (max(-1.0, bounds[0]), min(1.0, bounds[1]))


def mean_squares(scores: np.ndarray) -> tuple[float, float, float]:
    """Return the mean squares of seeds, rows and residuals of scores (seeds, rows). They are 0 for a single seed or
    row.
    """
    seeds, rows = scores.shape
    mean = scores.mean()
    by_seed = scores.mean(axis=1, keepdims=True) - mean
    by_row = scores.mean(axis=0, keepdims=True) - mean
    residuals = scores - mean - by_seed - by_row
    return (
        float(rows * (by_seed**2).sum() / max(1, seeds - 1)),
        float(seeds * (by_row**2).sum() / max(1, rows - 1)),
        float((residuals**2).sum() / max(1, (seeds - 1) * (rows - 1))),
    )
