"""The prefix tree of rows: tokens that rows share at their beginning are one node, the rest hangs under it.

Knows tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

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

    def insert(self, tokens: np.ndarray, share: bool, shareable: int | None = None) -> None:
        """Add a row; without ``share`` as a branch of its own.

        Args:
            shareable: how many of its first tokens other rows may share; None for all.
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


def added_tokens(
    ordered: Sequence[np.ndarray], share: bool, shareable: Sequence[int] | None = None
) -> list[int]:
    """Tokens that each of the rows, in sorted order, adds to a :class:`PrefixTree` of those before it."""
    added = []
    limits = [None] * len(ordered) if shareable is None else shareable
    last = np.zeros(0, np.int32)
    path = [(0, 0)]  # start and stop of the nodes of the last row, the root first
    for tokens, limit in zip(ordered, limits, strict=True):
        common = common_prefix(last, tokens[:limit]) if share else 0
        while path[-1][0] >= common and len(path) > 1:
            path.pop()
        start, stop = path[-1]
        if len(path) > 1 and common - start < LEAST_SHARED:
            common = start
            path.pop()
        elif common < stop:
            path[-1] = (start, common)
        if common < len(tokens):
            path.append((common, len(tokens)))
        added.append(len(tokens) - common)
        last = tokens[:limit]
    return added
