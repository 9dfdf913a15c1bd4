"""Prefix tree of rows, in which each shared prefix is one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

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
        node.tokens = node.tokens[cut:]
        node.start = at
        node.parent = upper
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
    tree = PrefixTree()
    limits = [None] * len(ordered) if shareable is None else shareable
    return [tree.insert(tokens, share, limit) for tokens, limit in zip(ordered, limits, strict=True)]
