"""Which process computes which rows of a step: as much work for each, and rows that begin alike together.

A step's time is that of its slowest process. Rows are dealt by the tokens that they cost, in one of two ways:
the rows in the order of their tokens, cut into runs (a prefix is computed once where the rows that share it
meet), or the longest first, each to the process with the least to do. The way whose busiest process has less
to do is taken. A group of rows, as a pair of answers, is dealt as one row, which costs what its rows do not
share. Everything follows from the rows alone, so that each process knows all parts.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

from deltaw.data.example import RowGroup
from deltaw.data.prefix_tree import common_prefix, sort_key


def deal(rows: Sequence[Any], parts: int, *, share: bool) -> list[list[int]]:
    """For each part the places of its rows, ascending; the first part has one wherever there are rows.

    Args:
        share: whether a prefix is computed once for the rows of a part.
    """
    whole = [_cost(row, share) for row in rows]
    even = _longest_first(whole, parts)
    firsts = [_rows_of(row)[0] for row in rows]
    if not share or parts == 1 or not all(hasattr(row, "tokens") for row in firsts):
        return even
    order = sorted(range(len(rows)), key=lambda place: sort_key(firsts[place].tokens))
    saved = [0] + [_alike(firsts[a], firsts[b]) for a, b in itertools.pairwise(order)]
    runs = _in_runs([whole[place] for place in order], saved, parts)
    together = [sorted(order[i] for i in run) for run in runs]
    if _busiest(runs, [whole[place] for place in order], saved) <= max(
        sum(whole[place] for place in part) for part in even
    ):
        return together
    return even


def _rows_of(row: Any) -> tuple[Any, ...]:
    """The rows of a group, or the row itself."""
    return row.rows if isinstance(row, RowGroup) else (row,)


def _cost(row: Any, share: bool) -> int:
    """Tokens of a row, or 1 where it has none, as an image; of a group, those of its rows, where they
    ``share`` a prefix without what is computed once for them."""
    if not hasattr(row, "__len__"):
        return 1
    own = _rows_of(row)
    if share and len(own) > 1:
        own = tuple(sorted(own, key=lambda one: sort_key(one.tokens)))
        return max(1, len(row) - sum(_alike(a, b) for a, b in itertools.pairwise(own)))
    return max(1, len(row))


def _alike(row: Any, other: Any) -> int:
    """Tokens at the beginning of both that are computed once for both."""
    return common_prefix(row.tokens[: row.shareable], other.tokens[: other.shareable])


def _longest_first(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Each row to the part with the least so far, the longest row first."""
    heap = [(0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        load, part = heapq.heappop(heap)
        dealt[part].append(place)
        heapq.heappush(heap, (load + costs[place], part))
    return [sorted(part) for part in dealt]


def _in_runs(costs: Sequence[int], saved: Sequence[int], parts: int) -> list[list[int]]:
    """Cut a sequence into at most ``parts`` runs so that the costliest costs the least (by bisection).

    A row behind another of its run costs what it does not share with it.
    """
    low, high = max(costs, default=0), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(costs, saved, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    runs = _cut(costs, saved, low)
    return runs + [[] for _ in range(parts - len(runs))]


def _cut(costs: Sequence[int], saved: Sequence[int], most: int) -> list[list[int]]:
    """Runs of at most this cost, each as long as it can be."""
    runs: list[list[int]] = []
    load = 0
    for place, cost in enumerate(costs):
        added = cost - saved[place]
        if runs and load + added <= most:
            runs[-1].append(place)
            load += added
        else:
            runs.append([place])
            load = cost
    return runs


def _busiest(runs: Sequence[Sequence[int]], costs: Sequence[int], saved: Sequence[int]) -> int:
    return max(sum(costs[i] - (saved[i] if n else 0) for n, i in enumerate(run)) for run in runs)
