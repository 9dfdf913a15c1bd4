"""Rows side by side, padded on the right: where to cut them into microbatches, and the arrays of one.

Rows of language models that cannot run packed, and labeled texts, are padded by the same functions. Padding
is masked by length, whatever token id it has.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

# What one microbatch more costs, in tokens: rows are cut where that saves more padding.
MICROBATCH_COST = {"cpu": 48, "cuda": 2048, "mps": 1024}


def microbatch_cost(device: str) -> int:
    """The entry of :data:`MICROBATCH_COST` for a device such as ``cuda:1``."""
    return MICROBATCH_COST.get(device.partition(":")[0], MICROBATCH_COST["cpu"])


def cut_by_length(
    lengths: Sequence[int], budget: int, cost: int, counts: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Cut items that are sorted by length into microbatches, so that padding and microbatches cost least.

    A microbatch costs its rows times the longest of them, and ``cost``; the cheapest cut is found exactly, by
    dynamic programming over where the last microbatch begins.

    Args:
        lengths: of each item's longest row, ascending. counts: rows of each item; one by default.
        budget: the most that rows times longest may be, unless one item alone is more.

    Returns:
        half-open ranges that follow each other.
    """
    count = len(lengths)
    rows = np.concatenate([[0], np.cumsum(np.ones(count, np.int64) if counts is None else counts)])
    best = np.zeros(count + 1, np.int64)
    begins = np.zeros(count + 1, np.int64)
    for stop in range(1, count + 1):
        longest = max(1, lengths[stop - 1])
        most = budget // longest  # rows
        first = min(stop - 1, int(np.searchsorted(rows, rows[stop] - most, side="left")))
        costs = best[first:stop] + (rows[stop] - rows[first:stop]) * longest
        begins[stop] = first + costs.argmin()
        best[stop] = costs.min() + cost
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(begins[cuts[-1]]))
    return [(start, stop) for stop, start in itertools.pairwise(cuts)][::-1]


def side_by_side(
    rows: Sequence[np.ndarray], longest: int | None = None, fill: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, int64 (rows, longest): each row on the left, ``fill`` and zeros behind it.

    Args:
        longest: tokens of a padded row; by default those of the longest.
    """
    longest = max(len(row) for row in rows) if longest is None else longest
    tokens = np.full((len(rows), longest), fill, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return tokens, mask
