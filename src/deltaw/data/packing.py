"""Examples become batches: flat rows without padding, what rows have in common standing there once.

The rows of an optimizer step are sorted, cut into passes that fit a budget of tokens, and each pass is laid
out as a prefix tree (:class:`deltaw.kernels.layout.Layout`): tokens that rows share at their beginning are
one segment with the rest hanging under it. A padded batch, for models that cannot run a flat row, has the
same type and gives the same loss.

Knows tokens and labels; not text, templates or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from deltaw.data.example import Example
from deltaw.kernels.layout import Layout

# Sharing fewer tokens than this saves less than the further segment costs.
LEAST_SHARED = 4
# Matrix libraries build a kernel for each shape that they meet, which takes about as long as a small product
# and some 0.6 MB each: flat rows are filled up to lengths that come again, at most this share longer. The
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
    """What one forward pass sees.

    Args:
        inputs: keyword arguments for the model: ``input_ids`` and ``position_ids`` (1, T) with the
            ``packed_layout``, or ``input_ids`` and ``attention_mask`` (rows, longest) where padded.
        predictors: (P,) index, in the flattened tokens, of the token whose output predicts each target.
        targets: (P,) token ids. weights: (P,) how many rows have this label here (fp32).
        rows: rows in it. row_tokens: tokens of all rows, before sharing. tokens: tokens computed.
        members: the rows and where their tokens are.
        asked: the places among ``predictors``, ascending and each once, on a flat row; None where padded.
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

    @property
    def label_tokens(self) -> int:
        """Labels over all rows: what a sum of cross-entropies is divided by."""
        return int(self.weights.sum().item())


def epoch_order(count: int, epoch: int, seed: int) -> np.ndarray:
    """The order of ``count`` rows in an epoch: a permutation that depends on nothing but its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def split_into_passes(
    examples: Sequence[Example], tokens_per_pass: int, *, share: bool = True, padded: bool = False
) -> list[list[Example]]:
    """Cut a step's rows into passes of about equal size, none over the budget unless one row alone is.

    Rows that begin alike come together where ``share`` is on, rows of like length where ``padded``.
    """
    ordered = sorted(examples, key=(lambda e: len(e.tokens)) if padded else _sort_key)
    costs = _costs(ordered, share and not padded)
    total = sum(costs)
    target = total / max(1, -(-total // tokens_per_pass))
    passes: list[list[Example]] = []
    filled = 0
    for example, cost in zip(ordered, costs, strict=True):
        whole = len(example.tokens)
        now = whole * (len(passes[-1]) + 1) if padded and passes else filled + cost
        if not passes or now > tokens_per_pass or filled >= target:
            passes.append([example])
            filled = whole
        else:
            passes[-1].append(example)
            filled = now
    return passes


def pass_shapes(
    examples: Sequence[Example],
    tokens_per_pass: int,
    *,
    share: bool = True,
    padded: bool = False,
    fill: bool = True,
) -> list[tuple[int, int]]:
    """(rows, length) of each pass of these rows, without laying any out; a flat pass is one row."""
    shapes = []
    for rows in split_into_passes(examples, tokens_per_pass, share=share, padded=padded):
        if padded:
            shapes.append((len(rows), max(len(row.tokens) for row in rows)))
        else:
            size = sum(_costs(rows, share))
            shapes.append((1, size + (_filler(size) if fill else 0)))
    return shapes


def pack(
    examples: Sequence[Example],
    *,
    share: bool = True,
    fill: bool = True,
    device: str | torch.device = "cpu",
) -> Batch:
    """One flat row of all examples as a prefix tree, or one segment a row where ``share`` is off.

    With ``fill``, a last segment of its own, which nothing sees and nothing is learned from, fills the row up
    to a length that is likely to come again (see FILL).
    """
    tree = _Tree()
    for example in sorted(examples, key=_sort_key):
        tree.insert(example, share)
    nodes = tree.depth_first()
    place = {id(node): i for i, node in enumerate(nodes)}
    parents = [place[id(n.parent)] if n.parent is not tree.root else -1 for n in nodes]
    lengths = [n.stop - n.start for n in nodes]
    filler = _filler(sum(lengths)) if fill else 0
    layout = (
        Layout.of_lengths([*lengths, filler], [*parents, -1])
        if filler
        else Layout.of_lengths(lengths, parents)
    )
    layout.device = torch.device(device)
    paths: list[np.ndarray] = []
    for n, parent in enumerate(parents):
        own = np.arange(layout.starts[n], layout.stops[n])
        paths.append(own if parent < 0 else np.concatenate([paths[parent], own]))
    members = tuple(Member(example, paths[place[id(leaf)]]) for example, leaf in tree.ends)
    weights = np.zeros(layout.length, np.float32)
    for member in members:
        weights[member.places] += member.example.is_label
    tokens = np.concatenate([*(n.tokens for n in nodes), np.zeros(filler, np.int32)])
    before = np.arange(layout.length) - 1
    for start, parent in zip(layout.starts, layout.parents, strict=True):
        before[start] = layout.stops[parent] - 1 if parent >= 0 else -1
    labelled = np.flatnonzero((weights > 0) & (before >= 0))
    return Batch(
        inputs={
            "input_ids": _tensor(tokens, device)[None],
            "position_ids": _tensor(layout.positions(), device)[None],
            "packed_layout": layout,
        },
        predictors=_tensor(before[labelled], device),
        targets=_tensor(tokens[labelled], device),
        weights=torch.from_numpy(weights[labelled]).to(device),
        rows=len(examples),
        row_tokens=sum(len(e.tokens) for e in examples),
        tokens=layout.length - filler,
        members=members,
        asked=_tensor(np.unique(before[labelled]), device),
    )


def pad(examples: Sequence[Example], *, device: str | torch.device = "cpu") -> Batch:
    """Rows side by side, filled up on the right; the filling is masked by length, whatever its token id."""
    longest = max(len(e.tokens) for e in examples)
    tokens = np.zeros((len(examples), longest), np.int64)
    mask = np.zeros((len(examples), longest), np.int64)
    predictors, targets, members = [], [], []
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = example.tokens
        mask[row, :length] = 1
        members.append(Member(example, np.arange(row * longest, row * longest + length)))
        labelled = np.flatnonzero(example.is_label[1:]) + 1
        predictors.append(row * longest + labelled - 1)
        targets.append(example.tokens[labelled])
    where = np.concatenate(predictors)
    return Batch(
        inputs={"input_ids": _tensor(tokens, device), "attention_mask": _tensor(mask, device)},
        predictors=_tensor(where, device),
        targets=_tensor(np.concatenate(targets), device),
        weights=torch.ones(len(where), device=device),
        rows=len(examples),
        row_tokens=int(mask.sum()),
        tokens=tokens.size,
        members=tuple(members),
    )


def batches(
    examples: Sequence[Example],
    tokens_per_pass: int,
    *,
    share: bool = True,
    padded: bool = False,
    fill: bool = True,
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """The passes of these rows, one after another, each laid out only when its turn comes."""
    for rows in split_into_passes(examples, tokens_per_pass, share=share, padded=padded):
        yield pad(rows, device=device) if padded else pack(rows, share=share, fill=fill, device=device)


@dataclass(eq=False)
class _Node:
    """A run of tokens, ``start:stop`` in the rows that pass through it."""

    tokens: np.ndarray
    start: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)


class _Tree:
    """A compressed prefix tree, fed with rows in sorted order, so that only its last path ever grows."""

    def __init__(self) -> None:
        self.root = _Node(np.zeros(0, np.int32), 0, None)
        self.ends: list[tuple[Example, _Node]] = []
        self._path = [self.root]
        self._last = np.zeros(0, np.int32)

    def insert(self, example: Example, share: bool) -> None:
        tokens = example.tokens
        common = _common_prefix(self._last, tokens) if share else 0
        while self._path[-1].start >= common and len(self._path) > 1:
            self._path.pop()
        node = self._path[-1]
        if node is not self.root and common - node.start < LEAST_SHARED:
            common = node.start
            self._path.pop()
        elif common < node.stop:
            self._path[-1] = self._split(node, common)
        if common < len(tokens):
            leaf = _Node(tokens[common:], common, self._path[-1])
            self._path[-1].children.append(leaf)
            self._path.append(leaf)
        self.ends.append((example, self._path[-1]))
        self._last = tokens

    @staticmethod
    def _split(node: _Node, at: int) -> _Node:
        """Put a new node above ``node`` for its tokens up to depth ``at``; return the new one."""
        cut = at - node.start
        upper = _Node(node.tokens[:cut], node.start, node.parent, [node])
        assert node.parent is not None
        node.parent.children[-1] = upper
        node.tokens, node.start, node.parent = node.tokens[cut:], at, upper
        return upper

    def depth_first(self) -> list[_Node]:
        nodes: list[_Node] = []
        waiting = list(reversed(self.root.children))
        while waiting:
            node = waiting.pop()
            nodes.append(node)
            waiting.extend(reversed(node.children))
        return nodes


def _filler(length: int) -> int:
    """Tokens without a label that bring a flat row to a length that comes again (see FILL)."""
    step = 1 << max(0, (length // FILL).bit_length() - 1)
    return -length % max(FILL, step)


def _sort_key(example: Example) -> bytes:
    """Bytes that sort as the token ids do, a prefix before what continues it."""
    return example.tokens.astype(">u4").tobytes()


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    length = min(len(left), len(right))
    differing = np.flatnonzero(left[:length] != right[:length])
    return int(differing[0]) if len(differing) else length


def _costs(ordered: Sequence[Example], share: bool) -> list[int]:
    """Tokens that each row adds to a pass when it follows the row before it."""
    costs = []
    last = np.zeros(0, np.int32)
    for example in ordered:
        common = _common_prefix(last, example.tokens) if share else 0
        costs.append(len(example.tokens) - (common if common >= LEAST_SHARED else 0))
        last = example.tokens
    return costs


def _tensor(values: np.ndarray, device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device)
