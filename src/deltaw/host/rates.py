"""How fast this processor computes, measured once: a matrix product, and an operator that hardly computes.

Good for the order of settings by their time, and no promise of seconds. Knows no models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deltaw.host.choices import dtype_of
from deltaw.host.processor import processor_flags, processor_name
from deltaw.hub.remembered import recall, remember

# Rows, inner size and columns of the product that is timed: a linear layer of a small model, one microbatch.
_PRODUCT = (512, 576, 1536)
_REPEATS, _TRIALS = 20, 5


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in matrix products, and seconds that any operator takes."""

    operations_per_second: float
    seconds_per_operator: float


def measured_rates(precision: str) -> Rates:
    """The rates of this machine with torch's present number of threads.

    Products of int8 weights are counted as those of bf16: a search compares settings of one precision.

    Args:
        precision: one of :data:`deltaw.host.choices.PRECISIONS`.
    """
    threads = torch.get_num_threads()
    key = [precision, torch.__version__, processor_name(), sorted(processor_flags()), threads]
    known = recall("rates", key)
    if isinstance(known, list) and len(known) == 2 and all(isinstance(n, float) and n > 0 for n in known):
        return Rates(*known)
    rows, inner, columns = _PRODUCT
    left = torch.ones(rows, inner, dtype=dtype_of(precision))
    right = torch.ones(inner, columns, dtype=dtype_of(precision))
    few = torch.ones(16)
    product = _fastest(lambda: torch.mm(left, right))
    rates = Rates(2 * rows * inner * columns / product, _fastest(lambda: few.add(1.0)))
    remember("rates", key, [rates.operations_per_second, rates.seconds_per_operator])
    return rates


def _fastest(use: Callable[[], object]) -> float:
    """Seconds of one use, in the fastest of some trials: what else the machine does only slows it down."""
    use()
    seconds = []
    for _ in range(_TRIALS):
        began = time.perf_counter()
        for _ in range(_REPEATS):
            use()
        seconds.append(time.perf_counter() - began)
    return min(seconds) / _REPEATS
