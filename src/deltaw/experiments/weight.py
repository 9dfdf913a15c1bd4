"""How much each setting matters: the part of the differences between trials that it accounts for alone.

It knows numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaw.training.evaluation.metrics import ranks

# Fewer trials than this say nothing.
FEWEST = 6


def weight(values: Sequence[object], losses: Sequence[float]) -> float | None:
    """Adjusted R² of the losses' ranks on one setting; 0 where it explains nothing, None where that is open.

    Ranks, so that one trial that went wrong does not decide. A number enters with its square, since the best
    is often in the middle, on a logarithmic scale where all are above zero; anything else by the mean of each
    value's trials. Adjusted for n trials and p terms: R² − (1 − R²)·p / (n − p − 1) (Theil 1961).
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
