"""How much each setting matters: the share of the variation between trials that it explains alone.

This module works on numbers and knows no settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.training.evaluation.metrics import ranks

# With fewer trials no estimate is made.
FEWEST = 6


def weight(values: Sequence[object], losses: Sequence[float]) -> float | None:
    """Adjusted R² of a regression of the losses' ranks on one setting.

    Ranks are used so that one bad trial does not dominate. A numeric setting enters with its square, since
    the best value is often in the middle, and on a logarithmic scale if all values are positive. Any other
    setting enters as the mean rank of each value. For n trials and p terms the adjusted R² is
    R² − (1 − R²)·p / (n − p − 1) (Theil 1961).

    Args:
        values: the setting's value in each trial.
        losses: the loss of each trial, in the same order.

    Returns:
        A share between 0 (explains nothing) and 1; None if there are too few trials to tell.
    """
    count = len(losses)
    if count < FEWEST or len(set(map(str, values))) < 2:
        return None
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == count and len(set(numbers)) > 2:
        x = np.asarray(numbers)
        x = np.log(x) if (x > 0).all() else x
        x = (x - x.mean()) / x.std()
        design = np.stack([np.ones(count), x, x * x], axis=1)
    else:
        names = sorted(set(map(str, values)))
        design = np.array([[float(str(v) == name) for name in names] for v in values])
    terms = design.shape[1] - 1
    if count - terms - 1 < 2:
        return None
    y = ranks(np.asarray(losses))
    spread = float(((y - y.mean()) ** 2).sum())
    if spread == 0:
        return None
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    r_square = 1 - float((left**2).sum()) / spread
    return max(0.0, r_square - (1 - r_square) * terms / (count - terms - 1))
