"""How fast this processor computes: matrix products as they are computed here, and an operator that hardly
computes.

Good for the order of settings by their time, and no promise of seconds. Knows no models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deltaw.cache import recall, remember
from deltaw.host.kernel_choice import STORED_BY_PRECISION, choose_kernels
from deltaw.host.processor import processor_flags, processor_name

MADE_BY = ("torch", "deltaw.host.rates")
_REPEATS, _TRIALS = 20, 5


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second in matrix products, and seconds that any operator takes."""

    operations_per_second: float
    seconds_per_operator: float


def measured_rates(precision: str) -> Rates:
    """The rates of this machine with torch's present number of threads, and the arithmetic chosen for it.

    Args:
        precision: one of :data:`deltaw.host.choices.PRECISIONS`; its weights are those of most products.
    """
    stored = STORED_BY_PRECISION.get(precision, "fp32")
    return Rates(choose_kernels().rate(stored) * 1e9, _seconds_per_operator())


def _seconds_per_operator() -> float:
    key = [processor_name(), sorted(processor_flags()), torch.get_num_threads()]
    known = recall("rates", key, MADE_BY)
    if isinstance(known, float) and known > 0:
        return known
    few = torch.ones(16)
    seconds = _fastest(lambda: few.add(1.0))
    remember("rates", key, seconds, MADE_BY)
    return seconds


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
