"""Microbatches of examples: packed without padding with shared prefixes, or padded.

The rows of an optimizer step are sorted and divided into microbatches of limited size. Each microbatch is a prefix tree
(:class:`deltaw.kernels.layout.Layout`), in which tokens shared by several rows are one segment. Groups of rows are
never divided. Padded batches, for models that cannot run packed rows, have the same type and result in the same loss.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example, Item, LabeledExample, RowGroup, rows_of
from deltaw.data.prefix_tree import PrefixTree, added_tokens, sort_key
from deltaw.kernels.layout import Layout, PositionShifts, to_device

# Cost of an additional microbatch in tokens, per device type. Rows are divided if that saves more padding.
MICROBATCH_COST = {"cpu": 48, "cuda": 2048, "mps": 1024}
# Packed rows are padded by at most 1/FILL to recurring lengths, because matrix libraries compile a kernel for each
# shape (about the time of a small matmul and 0.6 MB). The compiled kernels of deltaw do not need this.
FILL = 16
NO_LABELS = torch.zeros(0, dtype=torch.int64)


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


@dataclass(frozen=True)
class Padding:
    """Padding of rows.

    Attributes:
        token: Padding token. Padding is masked by length, so that any token is valid.
        multiple: Rows are padded to a multiple of this length.
        limit: Maximum length of padding, the number of positions of the model. None for no limit.
    """

    token: int = 0
    multiple: int = 1
    limit: int | None = None

    def length(self, items: Sequence[Any]) -> int:
        """Return the padded length of rows or groups."""
        longest = max(map(longest_of, items))
        padded = -(-longest // self.multiple) * self.multiple
        return padded if self.limit is None else max(longest, min(padded, self.limit))


PLAIN_PADDING = Padding()


@dataclass(frozen=True, eq=False)
class Member:
    """Row of a microbatch.

    Attributes:
        example: The row.
        indices: (row length,) indices of its tokens in the flattened batch. Shared tokens have the same index in all
            rows.
    """

    example: Any
    indices: np.ndarray


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Input of one forward pass, with its targets: packed or padded texts, or images.

    A language model predicts the label tokens of its rows. Other models predict one target per row, or rank the rows
    of a group.

    Attributes:
        inputs: Keyword arguments of the model: ``input_ids`` and ``position_ids`` (1, T) with ``packed_layout`` for
            packed rows; ``input_ids`` and ``attention_mask`` (rows, longest) for padded rows; or ``pixel_values``
            (rows, channels, height, width) in fp32. Texts may also have ``token_type_ids``, and
            ``adapter_active``, the mask of tokens that an activated adapter changes.
        targets: (P,) token ids of all label tokens; or (rows,) int64 class indices or fp32 numbers.
        members: Rows with the indices of their tokens. The rows of a group are consecutive.
        tokens: Number of computed tokens, including padding between rows.
        sizes: Number of rows of each group. Empty without groups. In a preference pair the preferred row is first.
        predictors: (P,) flattened index of the token whose output predicts each label token. Empty if rows have one
            target.
        weights: (P,) fp32 number of rows with this label token. Empty if rows have one target.
        predictor_indices: Distinct values of ``predictors``, ascending, for a packed row. None if padded.
        enter: Context manager that provides a batch for the stored outputs of frozen layers, to be used instead of this
            one. None to use this batch.
    """

    inputs: dict[str, Any]
    targets: Tensor
    members: tuple[Member, ...]
    tokens: int
    sizes: tuple[int, ...] = ()
    predictors: Tensor = NO_LABELS
    weights: Tensor = NO_LABELS
    predictor_indices: Tensor | None = None
    enter: Callable[[], AbstractContextManager[MicroBatch]] | None = None

    @property
    def examples(self) -> list[Any]:
        """Return the rows in batch order."""
        return [member.example for member in self.members]

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.members)

    @property
    def row_tokens(self) -> int:
        """Return the number of tokens of all rows, before sharing."""
        return sum(len(member.indices) for member in self.members)


def grouped_order(order: np.ndarray, groups: np.ndarray, epoch: int, seed: int) -> np.ndarray:
    """Return a permutation in which the rows of a group are consecutive. Groups are in random order.

    Args:
        order: (n,) permutation of the epoch, which defines the order within a group.
        groups: (n,) group of each row, from 0.
    """
    group_order = epoch_order(int(groups.max()) + 1, epoch, seed)
    rank = np.empty(len(group_order), np.int64)
    rank[group_order] = np.arange(len(group_order))
    return order[np.argsort(rank[groups[order]], kind="stable")]


@functools.lru_cache(maxsize=4)
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
    padding: Padding = PLAIN_PADDING,
) -> list[list[Item]]:
    """Divide the rows of a step into microbatches of at most ``tokens_per_pass`` tokens, unless one row or group is
    longer.

    The largest microbatch is first, so that its memory is sufficient for the others. Packed microbatches have similar
    sizes, and ``share`` groups rows with common prefixes. Padded microbatches group rows of similar length and minimize
    padding plus ``cost`` tokens per microbatch.

    Args:
        inactive_cost: Relative cost of a packed token that an activated adapter does not change.
        padding: Lengths of padded rows.
    """
    if padded:
        by_length = sorted(examples, key=longest_of)
        lengths = [padding.length([example]) for example in by_length]
        counts = [len(rows_of(example)) for example in by_length]
        cuts = cut_by_length(lengths, tokens_per_pass, cost, counts)
        cuts.sort(key=lambda cut: -sum(counts[slice(*cut)]) * lengths[cut[1] - 1])
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


def packed_length(items: Sequence[Any], *, share: bool = True, fill: bool = True, inactive_cost: float = 1.0) -> int:
    """Return the length of the row that :func:`pack` builds, without building it."""
    rows = sorted((row for item in items for row in rows_of(item)), key=lambda row: sort_key(row.tokens))
    length = sum(_added(rows, share, inactive_cost))
    return length + (_filler(length) if fill else 0)


def pack(
    examples: Sequence[Any],
    *,
    share: bool = True,
    fill: bool = True,
    fill_active: bool = False,
    device: str | torch.device = "cpu",
    first_position: int = 0,
    position_shifts: PositionShifts | None = None,
    segments: bool = False,
) -> MicroBatch:
    """Pack examples into one row as a prefix tree, or as one segment per row if ``share`` is False.

    Args:
        fill: Add an unlabeled last segment that pads the row to a recurring length (see :data:`FILL`).
        fill_active: Choose the padding by the number of tokens that an activated adapter changes.
        first_position: Position of the first token of a row.
        position_shifts: Returns numbers that are added to the positions of the tokens.
        segments: Add ``token_type_ids`` for text pairs.
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
    leaves = dict(zip(order, tree.leaves, strict=True))
    members = tuple(Member(row, paths[node_index[id(leaves[n])]]) for n, row in enumerate(rows))
    tokens = np.concatenate([*(n.tokens for n in nodes), np.zeros(filler, np.int32)])
    positions = layout.positions() + first_position
    if position_shifts is not None:
        positions += position_shifts(tokens, layout)
    inputs = {
        "input_ids": _tensor(tokens, device)[None],
        "position_ids": _tensor(positions, device)[None],
        "packed_layout": layout,
        **_token_inputs(members, (1, layout.length), segments, device),
    }
    preceding = np.arange(layout.length) - 1
    for start, parent in zip(layout.starts, layout.parents, strict=True):
        preceding[start] = layout.stops[parent] - 1 if parent >= 0 else -1
    return _with_targets(examples, inputs, members, tokens, preceding, layout.length - filler, device)


def pad(
    examples: Sequence[Any],
    *,
    device: str | torch.device = "cpu",
    padding: Padding = PLAIN_PADDING,
    segments: bool = False,
) -> MicroBatch:
    """Build a batch of rows padded on the right. Padding is masked by length.

    Args:
        segments: Add ``token_type_ids`` for text pairs.
    """
    rows = [row for item in examples for row in rows_of(item)]
    longest = padding.length(rows)
    members = tuple(Member(row, np.arange(n * longest, n * longest + len(row.tokens))) for n, row in enumerate(rows))
    tokens = np.full((len(rows), longest), padding.token, np.int64)
    mask = np.zeros(tokens.shape, np.int64)
    for member in members:
        tokens.reshape(-1)[member.indices] = member.example.tokens
        mask.reshape(-1)[member.indices] = 1
    inputs = {"input_ids": _tensor(tokens, device), "attention_mask": _tensor(mask, device)}
    inputs |= _token_inputs(members, tokens.shape, segments, device)
    preceding = np.arange(tokens.size) - 1
    preceding[::longest] = -1
    return _with_targets(examples, inputs, members, tokens.reshape(-1), preceding, tokens.size, device)


def _with_targets(
    items: Sequence[Any],
    inputs: dict[str, Any],
    members: tuple[Member, ...],
    tokens: np.ndarray,
    preceding: np.ndarray,
    num_computed: int,
    device: str | torch.device,
) -> MicroBatch:
    """Return the microbatch with the targets of its rows.

    Args:
        tokens: (T,) token ids of the flattened batch.
        preceding: (T,) index of the token before each token, or -1 if it is the first token of a row.
        num_computed: Number of computed tokens.
    """
    sizes = tuple(len(rows_of(item)) for item in items) if any(isinstance(i, RowGroup) for i in items) else ()
    if isinstance(members[0].example, LabeledExample):
        targets = row_targets([member.example for member in members], device)
        return MicroBatch(inputs, targets, members, num_computed, sizes)
    weights = np.zeros(len(tokens), np.float32)
    for member in members:
        weights[member.indices] += member.example.is_label
    labeled = np.flatnonzero((weights > 0) & (preceding >= 0))
    return MicroBatch(
        inputs,
        _tensor(tokens[labeled], device),
        members,
        num_computed,
        sizes,
        predictors=_tensor(preceding[labeled], device),
        weights=to_device(torch.from_numpy(weights[labeled]), device),
        predictor_indices=_tensor(np.unique(preceding[labeled]), device) if "packed_layout" in inputs else None,
    )


def row_targets(rows: Sequence[Any], device: str | torch.device) -> Tensor:
    """Return the labels of rows: int64 (rows,) class indices, or fp32 (rows,) or (rows, targets) numbers."""
    labels = [row.label for row in rows]
    dtype = torch.int64 if isinstance(labels[0], int) else torch.float32
    return to_device(torch.tensor(labels, dtype=dtype), device)


def _token_inputs(
    members: Sequence[Member], shape: tuple[int, ...], segments: bool, device: str | torch.device
) -> dict[str, Tensor]:
    """Return the model arguments that depend on the kind of each token.

    ``adapter_active`` is the mask of tokens that an activated adapter changes. ``token_type_ids`` is the index of the
    text that each token belongs to, in batches with text pairs.
    """
    inputs: dict[str, Tensor] = {}
    if any(member.example.active_from is not None for member in members):
        active = np.zeros(shape, bool)
        for member in members:
            active.reshape(-1)[member.indices[member.example.shareable_length :]] = True
        inputs["adapter_active"] = to_device(torch.from_numpy(active), device)
    if segments and any(member.example.segments is not None for member in members):
        kinds = np.zeros(shape, np.int64)
        for member in members:
            if (row_segments := member.example.segments) is not None:
                # Virtual tokens that a method prepends belong to the row's first text.
                kinds.reshape(-1)[member.indices[len(member.indices) - len(row_segments) :]] = row_segments
        inputs["token_type_ids"] = _tensor(kinds, device)
    return inputs


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
