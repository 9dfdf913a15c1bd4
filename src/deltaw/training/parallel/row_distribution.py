"""Distribution of a step's rows to processes, with equal work and common prefixes in the same process.

The slowest process determines the time of a step. There are two methods. The first sorts rows by their tokens and
splits them into contiguous runs, so that a shared prefix is computed once. The second assigns the longest row first,
each to the process with the least work. The method with the smaller maximum load is used. A group of rows, such as a
preference pair, is assigned as one row without its shared tokens. The result depends only on the rows, so that each
process computes it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from typing import Any

from deltaw.data.example import rows_of
from deltaw.data.prefix_tree import common_prefix, sort_key


def distribute_rows(rows: Sequence[Any], parts: int, *, share: bool) -> list[list[int]]:
    """Return the ascending indices of the rows of each part. The first part is not empty if there are rows.

    Args:
        rows: Rows of a step.
        parts: Number of parts.
        share: True if shared prefixes are computed once within a part.
    """
    costs = [_cost(row, share) for row in rows]
    balanced = _assign_longest_first(costs, parts)
    firsts = [rows_of(row)[0] for row in rows]
    if not share or parts == 1 or not all(hasattr(row, "tokens") for row in firsts):
        return balanced
    order = sorted(range(len(rows)), key=lambda index: sort_key(firsts[index].tokens))
    saved = [0] + [_shared_tokens(firsts[a], firsts[b]) for a, b in itertools.pairwise(order)]
    ordered = [costs[index] for index in order]
    runs = _split_into_runs(ordered, saved, parts)
    max_load = max(sum(ordered[i] - (saved[i] if n else 0) for n, i in enumerate(run)) for run in runs)
    if max_load > max(sum(costs[index] for index in part) for part in balanced):
        return balanced
    return [sorted(order[i] for i in run) for run in runs]


def _cost(row: Any, share: bool) -> int:
    """Return the number of computed tokens of a row or group, or 1 for an image.

    With ``share``, tokens shared within a group count once.
    """
    if not hasattr(row, "__len__"):
        return 1
    members = rows_of(row)
    if share and len(members) > 1:
        members = tuple(sorted(members, key=lambda member: sort_key(member.tokens)))
        return max(1, len(row) - sum(_shared_tokens(a, b) for a, b in itertools.pairwise(members)))
    return max(1, len(row))


def _shared_tokens(row: Any, other: Any) -> int:
    """Return the number of common tokens at the start of two rows that are computed once."""
    return common_prefix(row.tokens[: row.shareable_length], other.tokens[: other.shareable_length])


def _assign_longest_first(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Assign each row to the part with the least cost so far, the longest row first."""
    heap = [(0, part) for part in range(parts)]
    assigned: list[list[int]] = [[] for _ in range(parts)]
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, part = heapq.heappop(heap)
        assigned[part].append(index)
        heapq.heappush(heap, (load + costs[index], part))
    return [sorted(part) for part in assigned]


def _split_into_runs(costs: Sequence[int], saved: Sequence[int], parts: int) -> list[list[int]]:
    """Split a sequence into at most ``parts`` runs with the smallest maximum cost, by bisection.

    A row that follows another row of its run costs only the tokens that they do not share.
    """
    low = max(costs, default=0)
    high = sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_cut_runs(costs, saved, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    runs = _cut_runs(costs, saved, low)
    return runs + [[] for _ in range(parts - len(runs))]


def _cut_runs(costs: Sequence[int], saved: Sequence[int], max_cost: int) -> list[list[int]]:
    """Return runs of at most this cost, each as long as possible."""
    runs = list[list[int]]()
    load = 0
    for index, cost in enumerate(costs):
        added = cost - saved[index]
        if runs and load + added <= max_cost:
            runs[-1].append(index)
            load += added
        else:
            runs.append([index])
            load = cost
    return runs
