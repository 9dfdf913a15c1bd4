"""Examples become batches by padding-free packing, with the prefixes that rows share computed once.

The rows of an optimizer step are sorted, cut into microbatches that fit a budget of tokens, and each is laid
out as a prefix tree (:class:`deltaw.kernels.layout.Layout`): tokens that rows share at their beginning are
one segment with the rest hanging under it. Rows of a group stay in one microbatch. A padded batch, for models
that cannot run a packed row, has the same type and gives the same loss.

Knows tokens and labels; not text, templates or models.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example, Item, RowGroup, rows_of
from deltaw.kernels.layout import Layout
from deltaw.kernels.transfer import to_device

# Rows side by side, padded on the right: where to cut them into microbatches, and the arrays of one.
#
# Rows of language models that cannot run packed, and labeled texts, are padded by the same functions. Padding
# is masked by length, whatever token id it has.


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
        first = min(stop - 1, int(np.searchsorted(rows, rows[stop] - budget // longest, side="left")))
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


# The prefix tree of rows: tokens that rows share at their beginning are one node, the rest hangs under it.
#
# Knows tokens alone.


# Sharing fewer tokens than this saves less than the further segment costs.
LEAST_SHARED = 4


@dataclass(eq=False)
class Node:
    """A run of tokens, ``start:stop`` in the rows that pass through it."""

    tokens: np.ndarray
    start: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class PrefixTree:
    """A compressed prefix tree, fed with rows in sorted order, so that only its last path ever grows.

    Attributes:
        ends: for each row, in the order fed, the node that it ends in.
    """

    def __init__(self) -> None:
        self.root = Node(np.zeros(0, np.int32), 0, None)
        self.ends: list[Node] = []
        self._path = [self.root]
        self._last = np.zeros(0, np.int32)

    def insert(self, tokens: np.ndarray, share: bool, shareable: int | None = None) -> int:
        """Add a row; without ``share`` as a branch of its own.

        Args:
            shareable: how many of its first tokens other rows may share; None for all.

        Returns:
            how many of its tokens the tree did not have.
        """
        common = common_prefix(self._last, tokens[:shareable]) if share else 0
        while self._path[-1].start >= common and len(self._path) > 1:
            self._path.pop()
        node = self._path[-1]
        if node is not self.root and common - node.start < LEAST_SHARED:
            common = node.start
            self._path.pop()
        elif common < node.stop:
            self._path[-1] = self._split(node, common)
        if common < len(tokens):
            leaf = Node(tokens[common:], common, self._path[-1])
            self._path[-1].children.append(leaf)
            self._path.append(leaf)
        self.ends.append(self._path[-1])
        self._last = tokens[:shareable]
        return len(tokens) - common

    @staticmethod
    def _split(node: Node, at: int) -> Node:
        """Put a new node above ``node`` for its tokens up to depth ``at``; return the new one."""
        cut = at - node.start
        upper = Node(node.tokens[:cut], node.start, node.parent, [node])
        assert node.parent is not None
        node.parent.children[-1] = upper
        node.tokens, node.start, node.parent = node.tokens[cut:], at, upper
        return upper

    def depth_first(self) -> list[Node]:
        """All nodes but the root, each after its parent."""
        nodes: list[Node] = []
        waiting = list(reversed(self.root.children))
        while waiting:
            node = waiting.pop()
            nodes.append(node)
            waiting.extend(reversed(node.children))
        return nodes


def sort_key(tokens: np.ndarray) -> bytes:
    """Bytes that sort as the token ids do, a prefix before what continues it."""
    return tokens.astype(">u4").tobytes()


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


def added_tokens(ordered: Sequence[np.ndarray], share: bool, shareable: Sequence[int] | None = None) -> list[int]:
    """Tokens that each of the rows, in sorted order, adds to a :class:`PrefixTree` of those before it."""
    tree, limits = PrefixTree(), [None] * len(ordered) if shareable is None else shareable
    return [tree.insert(tokens, share, limit) for tokens, limit in zip(ordered, limits, strict=True)]


# What a data set has: rows, or groups of rows that one loss sees together.
# Matrix libraries build a kernel for each shape that they meet, which takes about as long as a small product
# and some 0.6 MB each: packed rows are filled up to lengths that come again, at most this share longer. The
# compiled kernels take any shape as it is.
FILL = 16


@dataclass(frozen=True, eq=False)
class Member:
    """A row in a batch.

    Args:
        places: (tokens of the row,) index of each in the batch's flattened tokens. What rows share stands in
            one place for all of them.
    """

    example: Example
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class Batch:
    """A microbatch: what one forward and backward sees.

    Args:
        inputs: keyword arguments for the model: ``input_ids`` and ``position_ids`` (1, T) with the
            ``packed_layout``, or ``input_ids`` and ``attention_mask`` (rows, longest) where padded; with an
            activated adapter also ``adapter_active``, the tokens that it acts on.
        predictors: (P,) index, in the flattened tokens, of the token whose output predicts each target.
        targets: (P,) token ids. weights: (P,) how many rows have this label here (fp32).
        rows: rows in it. row_tokens: tokens of all rows, before sharing. tokens: tokens computed.
        members: the rows and where their tokens are.
        asked: the places among ``predictors``, ascending and each once, in a packed row; None where padded.
        groups: for each group of rows its rows' places in ``members``, in the group's order; empty where
            rows come one by one.
        enter: opens the batch that the model runs instead, over what is kept of frozen layers; None: this one.
    """

    inputs: dict[str, object]
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    rows: int
    row_tokens: int
    tokens: int
    members: tuple[Member, ...]
    asked: Tensor | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    enter: Callable[[], AbstractContextManager[Batch]] | None = None

    @property
    def label_tokens(self) -> int:
        """Labels over all rows: what a sum of cross-entropies is divided by."""
        return int(self.weights.sum().item())


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """The order of ``count`` rows in an epoch: a permutation that depends on nothing but its arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False  # it is remembered: of millions of rows it takes as long as a step
    return order


def split_into_microbatches(
    examples: Sequence[Item],
    tokens_per_pass: int,
    *,
    share: bool = True,
    padded: bool = False,
    cost: int = 0,
    inactive_cost: float = 1.0,
) -> list[list[Item]]:
    """Cut a step's rows into microbatches, none over the budget unless one row (or group) alone is.

    The largest comes first: what the others need fits where it was in memory. Packed, they are of about equal size, and
    rows that begin alike come together where ``share`` is on.
    ``padded``, rows of like length come together, cut where padding and ``cost`` a microbatch are least. A
    packed token on which an activated adapter does not act counts ``inactive_cost``.
    """
    if padded:
        by_length = sorted(examples, key=longest_of)
        counts = [len(rows_of(example)) for example in by_length]
        cuts = cut_by_length([*map(longest_of, by_length)], tokens_per_pass, cost, counts)
        cuts.sort(key=lambda cut: -sum(counts[slice(*cut)]) * longest_of(by_length[cut[1] - 1]))
        return [by_length[start:stop] for start, stop in cuts]
    ordered = sorted(examples, key=lambda e: sort_key(rows_of(e)[0].tokens))
    sizes = [sum(_added(rows_of(example), share, inactive_cost)) for example in ordered]
    costs = _costs(ordered, share, inactive_cost)
    total = sum(costs)
    target = total / max(1, -(-total // tokens_per_pass))
    parts: list[list[Item]] = []
    filled: list[float] = []
    for example, size, added in zip(ordered, sizes, costs, strict=True):
        if not parts or filled[-1] + added > tokens_per_pass or filled[-1] >= target:
            parts.append([example])
            filled.append(size)
        else:
            parts[-1].append(example)
            filled[-1] += added
    return [parts[place] for place in sorted(range(len(parts)), key=lambda place: -filled[place])]


def microbatch_shapes(
    parts: Sequence[Sequence[Item]],
    *,
    share: bool = True,
    padded: bool = False,
    fill: bool = True,
    inactive_cost: float = 1.0,
) -> list[tuple[int, int]]:
    """(rows, length) of each microbatch, without laying any out; a packed one is one row."""
    shapes = []
    for part in parts:
        rows = [row for item in part for row in rows_of(item)]
        if padded:
            shapes.append((len(rows), max(len(row.tokens) for row in rows)))
        else:
            size = sum(_added(sorted(rows, key=lambda row: sort_key(row.tokens)), share, inactive_cost))
            shapes.append((1, size + (_filler(size) if fill else 0)))
    return shapes


def pack(
    examples: Sequence[Item],
    *,
    share: bool = True,
    fill: bool = True,
    fill_active: bool = False,
    device: str | torch.device = "cpu",
) -> Batch:
    """One packed row of all examples as a prefix tree, or one segment a row where ``share`` is off.

    With ``fill``, a last segment of its own, which nothing sees and nothing is learned from, fills the row up
    to a length that is likely to come again (see FILL); with ``fill_active``, those of its tokens that an
    activated adapter acts on, to a number of them.
    """
    rows = [row for item in examples for row in rows_of(item)]
    order = sorted(range(len(rows)), key=lambda n: sort_key(rows[n].tokens))
    tree = PrefixTree()
    for n in order:
        tree.insert(rows[n].tokens, share, rows[n].shareable)
    nodes = tree.depth_first()
    place = {id(node): i for i, node in enumerate(nodes)}
    parents = [place[id(n.parent)] if n.parent is not tree.root else -1 for n in nodes]
    lengths = [n.stop - n.start for n in nodes]
    counted = sum(len(row.tokens) - row.shareable for row in rows) if fill_active else sum(lengths)
    filler = _filler(counted) if fill else 0
    layout = Layout.of_lengths([*lengths, filler], [*parents, -1]) if filler else Layout.of_lengths(lengths, parents)
    layout.device = torch.device(device)
    paths: list[np.ndarray] = []
    for n, parent in enumerate(parents):
        own = np.arange(layout.starts[n], layout.stops[n])
        paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
    members = tuple(Member(rows[n], paths[place[id(leaf)]]) for n, leaf in zip(order, tree.ends, strict=True))
    weights = np.zeros(layout.length, np.float32)
    for member in members:
        weights[member.places] += member.example.is_label
    tokens = np.concatenate([*(n.tokens for n in nodes), np.zeros(filler, np.int32)])
    active = np.zeros(layout.length, bool)
    for member in members:
        active[member.places[member.example.shareable :]] = True
    before = np.arange(layout.length) - 1
    for start, parent in zip(layout.starts, layout.parents, strict=True):
        before[start] = layout.stops[parent] - 1 if parent >= 0 else -1
    labeled = np.flatnonzero((weights > 0) & (before >= 0))
    return Batch(
        inputs={
            "input_ids": _tensor(tokens, device)[None],
            "position_ids": _tensor(layout.positions(), device)[None],
            "packed_layout": layout,
            **_active(rows, active[None], device),
        },
        predictors=_tensor(before[labeled], device),
        targets=_tensor(tokens[labeled], device),
        weights=to_device(torch.from_numpy(weights[labeled]), device),
        rows=len(rows),
        row_tokens=sum(len(row.tokens) for row in rows),
        tokens=layout.length - filler,
        members=members,
        asked=_tensor(np.unique(before[labeled]), device),
        groups=_groups(examples, order),
    )


def pad(examples: Sequence[Item], *, device: str | torch.device = "cpu") -> Batch:
    """Rows side by side, padded on the right; padding is masked by length, whatever its token id."""
    rows = [row for item in examples for row in rows_of(item)]
    tokens, mask = side_by_side([row.tokens for row in rows])
    longest = tokens.shape[1]
    predictors, targets, members = [], [], []
    active = np.zeros(tokens.shape, bool)
    for place, row in enumerate(rows):
        active[place, row.shareable : len(row.tokens)] = True
        begin = place * longest
        members.append(Member(row, np.arange(begin, begin + len(row.tokens))))
        labeled = np.flatnonzero(row.is_label[1:]) + 1
        predictors.append(begin + labeled - 1)
        targets.append(row.tokens[labeled])
    where = np.concatenate(predictors)
    return Batch(
        inputs={
            "input_ids": _tensor(tokens, device),
            "attention_mask": _tensor(mask, device),
            **_active(rows, active, device),
        },
        predictors=_tensor(where, device),
        targets=_tensor(np.concatenate(targets), device),
        weights=torch.ones(len(where), device=device),
        rows=len(rows),
        row_tokens=int(mask.sum()),
        tokens=tokens.size,
        members=tuple(members),
        groups=_groups(examples, range(len(rows))),
    )


def batches(
    examples: Sequence[Item],
    tokens_per_pass: int,
    *,
    share: bool = True,
    padded: bool = False,
    fill: bool = True,
    device: str | torch.device = "cpu",
    cost: int = 0,
    inactive_cost: float = 1.0,
) -> Iterator[Batch]:
    """The microbatches of these rows, one after another, each laid out only when its turn comes."""
    for part in split_into_microbatches(
        examples, tokens_per_pass, share=share, padded=padded, cost=cost, inactive_cost=inactive_cost
    ):
        if padded:
            yield pad(part, device=device)
        else:
            yield pack(part, share=share, fill=fill, fill_active=inactive_cost != 1.0, device=device)


def _active(rows: Sequence[Example], active: np.ndarray, device: str | torch.device) -> dict[str, Tensor]:
    """The model's argument that says where an activated adapter acts; none for rows without one."""
    if all(row.active_from is None for row in rows):
        return {}
    return {"adapter_active": to_device(torch.from_numpy(active), device)}


def _groups(items: Sequence[Item], order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Each group's rows by their place in ``order``, which holds the numbers of all rows."""
    if not any(isinstance(item, RowGroup) for item in items):
        return ()
    places = iter(np.argsort(order).tolist())
    return tuple(tuple(next(places) for _ in rows_of(item)) for item in items)


def longest_of(item: Any) -> int:
    """Tokens of the longest row of a group, or of a row."""
    return max(map(len, rows_of(item)))


def _added(rows: Sequence[Example], share: bool, inactive_cost: float = 1.0) -> list[int]:
    added = added_tokens([row.tokens for row in rows], share, [row.shareable for row in rows])
    if inactive_cost == 1.0:
        return added
    active = [0 if row.active_from is None else len(row.tokens) - row.active_from for row in rows]
    return [own + math.ceil((n - own) * inactive_cost) for n, own in zip(added, active, strict=True)]


def _costs(ordered: Sequence[Item], share: bool, inactive_cost: float = 1.0) -> list[int]:
    """Tokens that each row or group adds to a microbatch when it follows the one before it."""
    each = iter(_added([row for item in ordered for row in rows_of(item)], share, inactive_cost))
    return [sum(next(each) for _ in rows_of(item)) for item in ordered]


def _filler(length: int) -> int:
    """Tokens without a label that bring a packed row to a length that comes again (see FILL)."""
    return -length % max(FILL, 1 << max(0, (length // FILL).bit_length() - 1))


def _tensor(values: np.ndarray, device: str | torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)), device)
