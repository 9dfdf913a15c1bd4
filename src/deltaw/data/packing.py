"""Microbatches of examples: packed without padding with shared prefixes, or padded.

The rows of an optimizer step are sorted and divided into microbatches of limited size. Each microbatch is a prefix tree
(:class:`deltaw.kernels.layout.Layout`), in which tokens shared by several rows are one segment. Groups of rows are
never divided. Padded batches, for models that cannot run packed rows, have the same type and result in the same loss.
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

# Padded batches of language model rows and labeled texts. Padding is masked by length, so that any token id is valid.

# Cost of an additional microbatch in tokens, per device type. Rows are divided if that saves more padding.
MICROBATCH_COST = {"cpu": 48, "cuda": 2048, "mps": 1024}


def microbatch_cost(device: str) -> int:
    """Return the entry of :data:`MICROBATCH_COST` for a device such as ``cuda:1``."""
    return MICROBATCH_COST.get(device.partition(":")[0], MICROBATCH_COST["cpu"])


def cut_by_length(
    lengths: Sequence[int], budget: int, cost: int, counts: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Divide items sorted by length into microbatches of minimum total cost.

    A microbatch costs its number of rows times its longest row, plus ``cost``. The optimum is found by dynamic
    programming.

    Args:
        lengths: Length of each item's longest row, ascending.
        budget: Maximum number of rows times the longest row, unless one item exceeds it.
        cost: Cost of a microbatch in tokens.
        counts: Number of rows of each item, 1 by default.

    Returns:
        Consecutive half-open ranges.
    """
    count = len(lengths)
    rows = np.concatenate([[0], np.cumsum(np.ones(count, np.int64) if counts is None else counts)])
    best = np.zeros(count + 1, np.int64)
    starts = np.zeros(count + 1, np.int64)
    for stop in range(1, count + 1):
        longest = max(1, lengths[stop - 1])
        first = min(stop - 1, int(np.searchsorted(rows, rows[stop] - budget // longest, side="left")))
        costs = best[first:stop] + (rows[stop] - rows[first:stop]) * longest
        starts[stop] = first + costs.argmin()
        best[stop] = costs.min() + cost
    cuts = [count]
    while cuts[-1]:
        cuts.append(int(starts[cuts[-1]]))
    return [(start, stop) for stop, start in itertools.pairwise(cuts)][::-1]


def pad_rows(rows: Sequence[np.ndarray], longest: int | None = None, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, longest) int64 token ids and mask, padded on the right with ``fill``.

    Args:
        longest: Length of a padded row, by default that of the longest row.
    """
    longest = max(len(row) for row in rows) if longest is None else longest
    tokens = np.full((len(rows), longest), fill, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return tokens, mask


# Prefix tree of rows.

# Minimum number of shared tokens, below which an additional segment costs more than sharing saves.
MIN_SHARED_TOKENS = 4


@dataclass(eq=False)
class Node:
    """Tokens ``start:stop`` of the rows that pass through this node."""

    tokens: np.ndarray
    start: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class PrefixTree:
    """Compressed prefix tree of rows that are inserted in sorted order.

    Attributes:
        leaves: Last node of each row, in insertion order.
    """

    def __init__(self) -> None:
        self.root = Node(np.zeros(0, np.int32), 0, None)
        self.leaves: list[Node] = []
        self._path = [self.root]
        self._last = np.zeros(0, np.int32)

    def insert(self, tokens: np.ndarray, share: bool, shareable_length: int | None = None) -> int:
        """Insert a row, as a separate branch if ``share`` is False.

        Args:
            shareable_length: Number of leading tokens that other rows may share, or None if all are shareable.

        Returns:
            The number of tokens added to the tree.
        """
        common = common_prefix(self._last, tokens[:shareable_length]) if share else 0
        while self._path[-1].start >= common and len(self._path) > 1:
            self._path.pop()
        node = self._path[-1]
        if node is not self.root and common - node.start < MIN_SHARED_TOKENS:
            common = node.start
            self._path.pop()
        elif common < node.stop:
            self._path[-1] = self._split(node, common)
        if common < len(tokens):
            leaf = Node(tokens[common:], common, self._path[-1])
            self._path[-1].children.append(leaf)
            self._path.append(leaf)
        self.leaves.append(self._path[-1])
        self._last = tokens[:shareable_length]
        return len(tokens) - common

    @staticmethod
    def _split(node: Node, at: int) -> Node:
        """Split ``node`` at depth ``at`` and return the new upper node."""
        cut = at - node.start
        upper = Node(node.tokens[:cut], node.start, node.parent, [node])
        assert node.parent is not None
        node.parent.children[-1] = upper
        node.tokens, node.start, node.parent = node.tokens[cut:], at, upper
        return upper

    def depth_first(self) -> list[Node]:
        """Return all nodes except the root, parents first."""
        nodes: list[Node] = []
        stack = list(reversed(self.root.children))
        while stack:
            node = stack.pop()
            nodes.append(node)
            stack.extend(reversed(node.children))
        return nodes


def sort_key(tokens: np.ndarray) -> bytes:
    """Return bytes with the sort order of the token ids. Prefixes sort before their continuations."""
    return tokens.astype(">u4").tobytes()


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Return the number of common leading tokens."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def added_tokens(ordered: Sequence[np.ndarray], share: bool, shareable: Sequence[int] | None = None) -> list[int]:
    """Return the number of tokens that each row, in sorted order, adds to the prefix tree of the preceding rows."""
    tree, limits = PrefixTree(), [None] * len(ordered) if shareable is None else shareable
    return [tree.insert(tokens, share, limit) for tokens, limit in zip(ordered, limits, strict=True)]


# Packed rows are padded by at most 1/FILL to recurring lengths, because matrix libraries compile a kernel for each
# shape (about the time of a small matmul and 0.6 MB). The compiled kernels of deltaw do not need this.
FILL = 16


@dataclass(frozen=True, eq=False)
class Member:
    """Row of a batch.

    Attributes:
        example: The row.
        indices: (row length,) indices of its tokens in the flattened batch. Shared tokens have the same index in all
            rows.
    """

    example: Example
    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Microbatch of a language model.

    Attributes:
        inputs: Keyword arguments of the model: ``input_ids`` and ``position_ids`` (1, T) with ``packed_layout``, or
            ``input_ids`` and ``attention_mask`` (rows, longest) if padded. With an activated adapter also
            ``adapter_active``, the mask of tokens that it changes.
        predictors: (P,) flattened index of the token whose output predicts each target.
        targets: (P,) token ids.
        weights: (P,) fp32 number of rows with this label.
        rows: Number of rows.
        row_tokens: Number of tokens of all rows, before sharing.
        tokens: Number of computed tokens.
        members: Rows with the indices of their tokens.
        predictor_indices: Distinct values of ``predictors``, ascending, for a packed row. None if padded.
        groups: For each group, the indices of its rows in ``members``, in group order. Empty without groups.
        enter: Context manager that provides a batch for the stored outputs of frozen layers, to be used instead of this
            one. None to use this batch.
    """

    inputs: dict[str, object]
    predictors: Tensor
    targets: Tensor
    weights: Tensor
    rows: int
    row_tokens: int
    tokens: int
    members: tuple[Member, ...]
    predictor_indices: Tensor | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    enter: Callable[[], AbstractContextManager[PackedBatch]] | None = None

    @property
    def label_tokens(self) -> int:
        """Return the number of labels of all rows, by which the summed cross-entropy is divided."""
        return int(self.weights.sum().item())


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """Return a permutation of ``count`` rows that depends only on the arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.flags.writeable = False  # cached, because permuting millions of rows takes as long as a step
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
    """Divide the rows of a step into microbatches of at most ``tokens_per_pass`` tokens, unless one row or group is
    longer.

    The largest microbatch is first, so that its memory is sufficient for the others. Packed microbatches have similar
    sizes, and ``share`` groups rows with common prefixes. Padded microbatches group rows of similar length and minimize
    padding plus ``cost`` tokens per microbatch.

    Args:
        inactive_cost: Relative cost of a packed token that an activated adapter does not change.
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
    return [parts[index] for index in sorted(range(len(parts)), key=lambda index: -filled[index])]


def microbatch_shapes(
    parts: Sequence[Sequence[Item]],
    *,
    share: bool = True,
    padded: bool = False,
    fill: bool = True,
    inactive_cost: float = 1.0,
) -> list[tuple[int, int]]:
    """Return (rows, length) of each microbatch without building it. A packed microbatch has one row."""
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
) -> PackedBatch:
    """Pack examples into one row as a prefix tree, or as one segment per row if ``share`` is False.

    Args:
        fill: Add an unlabeled last segment that pads the row to a recurring length (see :data:`FILL`).
        fill_active: Choose the padding by the number of tokens that an activated adapter changes.
    """
    rows = [row for item in examples for row in rows_of(item)]
    order = sorted(range(len(rows)), key=lambda n: sort_key(rows[n].tokens))
    tree = PrefixTree()
    for n in order:
        tree.insert(rows[n].tokens, share, rows[n].shareable_length)
    nodes = tree.depth_first()
    node_index = {id(node): i for i, node in enumerate(nodes)}
    parents = [node_index[id(n.parent)] if n.parent is not tree.root else -1 for n in nodes]
    lengths = [n.stop - n.start for n in nodes]
    num_computed = sum(len(row.tokens) - row.shareable_length for row in rows) if fill_active else sum(lengths)
    filler = _filler(num_computed) if fill else 0
    layout = Layout.of_lengths([*lengths, filler], [*parents, -1]) if filler else Layout.of_lengths(lengths, parents)
    layout.device = torch.device(device)
    paths: list[np.ndarray] = []
    for n, parent in enumerate(parents):
        segment = np.arange(layout.starts[n], layout.stops[n])
        paths.append(segment if parent < 0 else np.concatenate([paths[parent], segment]))
    members = tuple(Member(rows[n], paths[node_index[id(leaf)]]) for n, leaf in zip(order, tree.leaves, strict=True))
    weights = np.zeros(layout.length, np.float32)
    for member in members:
        weights[member.indices] += member.example.is_label
    tokens = np.concatenate([*(n.tokens for n in nodes), np.zeros(filler, np.int32)])
    active = np.zeros(layout.length, bool)
    for member in members:
        active[member.indices[member.example.shareable_length :]] = True
    preceding = np.arange(layout.length) - 1
    for start, parent in zip(layout.starts, layout.parents, strict=True):
        preceding[start] = layout.stops[parent] - 1 if parent >= 0 else -1
    labeled = np.flatnonzero((weights > 0) & (preceding >= 0))
    return PackedBatch(
        inputs={
            "input_ids": _tensor(tokens, device)[None],
            "position_ids": _tensor(layout.positions(), device)[None],
            "packed_layout": layout,
            **_active(rows, active[None], device),
        },
        predictors=_tensor(preceding[labeled], device),
        targets=_tensor(tokens[labeled], device),
        weights=to_device(torch.from_numpy(weights[labeled]), device),
        rows=len(rows),
        row_tokens=sum(len(row.tokens) for row in rows),
        tokens=layout.length - filler,
        members=members,
        predictor_indices=_tensor(np.unique(preceding[labeled]), device),
        groups=_groups(examples, order),
    )


def pad(examples: Sequence[Item], *, device: str | torch.device = "cpu") -> PackedBatch:
    """Build a batch of rows padded on the right. Padding is masked by length."""
    rows = [row for item in examples for row in rows_of(item)]
    tokens, mask = pad_rows([row.tokens for row in rows])
    longest = tokens.shape[1]
    predictors, targets, members = [], [], []
    active = np.zeros(tokens.shape, bool)
    for index, row in enumerate(rows):
        active[index, row.shareable_length : len(row.tokens)] = True
        start = index * longest
        members.append(Member(row, np.arange(start, start + len(row.tokens))))
        labeled = np.flatnonzero(row.is_label[1:]) + 1
        predictors.append(start + labeled - 1)
        targets.append(row.tokens[labeled])
    all_predictors = np.concatenate(predictors)
    inputs = {"input_ids": _tensor(tokens, device), "attention_mask": _tensor(mask, device)}
    return PackedBatch(
        inputs={**inputs, **_active(rows, active, device)},
        predictors=_tensor(all_predictors, device),
        targets=_tensor(np.concatenate(targets), device),
        weights=torch.ones(len(all_predictors), device=device),
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
) -> Iterator[PackedBatch]:
    """Yield the microbatches of the rows, each built on demand."""
    for part in split_into_microbatches(
        examples, tokens_per_pass, share=share, padded=padded, cost=cost, inactive_cost=inactive_cost
    ):
        if padded:
            yield pad(part, device=device)
        else:
            yield pack(part, share=share, fill=fill, fill_active=inactive_cost != 1.0, device=device)


def _active(rows: Sequence[Example], active: np.ndarray, device: str | torch.device) -> dict[str, Tensor]:
    """Return the model argument with the mask of active tokens, or an empty dict without an activated adapter."""
    if all(row.active_from is None for row in rows):
        return {}
    return {"adapter_active": to_device(torch.from_numpy(active), device)}


def _groups(items: Sequence[Item], order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Return the indices of each group's rows in ``order``, a permutation of all rows."""
    if not any(isinstance(item, RowGroup) for item in items):
        return ()
    positions = iter(np.argsort(order).tolist())
    return tuple(tuple(next(positions) for _ in rows_of(item)) for item in items)


def longest_of(item: Any) -> int:
    """Return the length of a row, or of the longest row of a group."""
    return max(map(len, rows_of(item)))


def _added(rows: Sequence[Example], share: bool, inactive_cost: float = 1.0) -> list[int]:
    added = added_tokens([row.tokens for row in rows], share, [row.shareable_length for row in rows])
    if inactive_cost == 1.0:
        return added
    active = [0 if row.active_from is None else len(row.tokens) - row.active_from for row in rows]
    return [count + math.ceil((n - count) * inactive_cost) for n, count in zip(added, active, strict=True)]


def _costs(ordered: Sequence[Item], share: bool, inactive_cost: float = 1.0) -> list[int]:
    """Return the number of tokens that each row or group adds when it follows the preceding one."""
    each = iter(_added([row for item in ordered for row in rows_of(item)], share, inactive_cost))
    return [sum(next(each) for _ in rows_of(item)) for item in ordered]


def _filler(length: int) -> int:
    """Return the number of padding tokens up to the next recurring length (see :data:`FILL`)."""
    return -length % max(FILL, 1 << max(0, (length // FILL).bit_length() - 1))


def _tensor(values: np.ndarray, device: str | torch.device) -> Tensor:
    return to_device(torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)), device)
