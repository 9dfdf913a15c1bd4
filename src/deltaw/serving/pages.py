"""Pages of keys and values: who uses which, what is kept for prompts that begin alike, what gives way.

Tokens stand here as keys, one whole number each, which name all that a token's keys and values depend on
besides the tokens before it: its id, and the adapter that acts on it (:func:`token_keys`). Full pages that
were written stand in a tree by their keys. A sequence that begins like a path of that tree uses its pages;
pages in the tree are never written again. Where a sequence leaves the path in the middle of a page, that
page is copied. Each owner has a tree of its own, so that nobody finds what others wrote.

Pages that no sequence uses stay until their room is wanted; the least recently used one goes first, children
before parents.

Knows numbers of pages; not what is in them, nor when a sequence runs.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# Below this share of a page it is not worth copying.
LEAST_COPIED = 1 / 8
_VIRTUAL = 1 << 31


def token_keys(tokens: np.ndarray, adapter: int = 0) -> np.ndarray:
    """(n) int64 keys of token ids (n).

    Args:
        adapter: the number of the adapter that acts on them; 0 for none.
    """
    keys: np.ndarray = tokens.astype(np.int64) + (adapter << 32)
    return keys


def virtual_keys(count: int, adapter: int) -> np.ndarray:
    """(count) keys of the virtual tokens of an adapter's soft prompt."""
    return token_keys(np.arange(count, dtype=np.int64) + _VIRTUAL, adapter)


@dataclass(eq=False)
class _Node:
    """A page in the tree: full, or a last one that was given back in part."""

    page: int
    keys: np.ndarray
    parent: _Node | None
    users: int = 0
    used: int = 0
    # Children by their first key.
    children: dict[int, list[_Node]] = field(default_factory=dict)

    def child(self, keys: np.ndarray) -> _Node | None:
        """The child with exactly these keys."""
        for node in self.children.get(int(keys[0]), ()):
            if len(node.keys) == len(keys) and np.array_equal(node.keys, keys):
                return node
        return None

    def nearest(self, keys: np.ndarray) -> tuple[_Node | None, int]:
        """The child that begins most like these keys (n ≥ 1), and for how many."""
        best: _Node | None = None
        most = 0
        for node in self.children.get(int(keys[0]), ()):
            common = _common(node.keys, keys)
            if common > most:
                best, most = node, common
        return best, most


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many keys two sequences have in common from their start."""
    length = min(len(one), len(other))
    apart = np.flatnonzero(one[:length] != other[:length])
    return int(apart[0]) if apart.size else length


@dataclass(eq=False)
class SequencePages:
    """The pages of one sequence, in order.

    Attributes:
        pages: their numbers; the first ``len(nodes)`` stand in the tree.
        length: tokens whose keys and values are written.
        reused: tokens that were found written when it began.
        root: of the tree that it takes pages from, and gives them to.
    """

    root: _Node = field(repr=False)
    pages: list[int] = field(default_factory=list)
    length: int = 0
    reused: int = 0
    nodes: list[_Node] = field(default_factory=list, repr=False)


class PagePool:
    """All pages of an engine.

    Args:
        count: of pages. page_tokens: tokens of one. copy: copies a page to another.

    Attributes:
        reused: tokens found written, since the start.
    """

    def __init__(self, count: int, page_tokens: int, copy: Callable[[int, int], None]) -> None:
        self.count, self.page_tokens = count, page_tokens
        self.reused = 0
        self._copy = copy
        self._free = list(range(count - 1, -1, -1))
        self._roots: dict[int, _Node] = {}
        self._unused = 0  # nodes without users
        self._clock = itertools.count(1)
        self._oldest: list[tuple[int, int, _Node]] = []
        self._order = itertools.count()

    @property
    def available(self) -> int:
        """Pages that could be had now."""
        return len(self._free) + self._unused

    def begin(self, keys: np.ndarray, owner: int = 0) -> SequencePages:
        """The pages of a new sequence: those of the longest beginning of ``keys`` that is written.

        Args:
            keys: of the tokens that may be taken over; the last one of a prompt, whose logits are wanted,
                should not be among them.
            owner: whose pages may be taken, and who may take those of this sequence.
        """
        root = self._roots.setdefault(owner, _Node(-1, np.empty(0, np.int64), None))
        found = SequencePages(root)
        node, size, at = root, self.page_tokens, 0
        while at < len(keys):
            child = node.child(keys[at : at + size]) if len(keys) - at >= size else None
            if child is None:
                at += self._copied_part(found, node, keys[at:])
                break
            self._use(child)
            found.nodes.append(child)
            found.pages.append(child.page)
            node, at = child, at + size
        found.length = found.reused = at
        self.reused += at
        return found

    def _copied_part(self, found: SequencePages, node: _Node, keys: np.ndarray) -> int:
        """Give a sequence a copy of the page below ``node`` that begins like ``keys``; how many tokens of it
        count."""
        nearest, common = node.nearest(keys[: self.page_tokens])
        if nearest is None or common < max(1, self.page_tokens * LEAST_COPIED):
            return 0
        self._use(nearest)  # so that it does not give way to its own copy
        page = self._take() if self.available else None
        self._leave(nearest)
        if page is None:
            return 0
        self._copy(nearest.page, page)
        found.pages.append(page)
        return common

    def reserve(self, sequence: SequencePages, length: int) -> bool:
        """Give a sequence pages for ``length`` tokens; False where there are not enough, and then none."""
        missing = -(-length // self.page_tokens) - len(sequence.pages)
        if missing > self.available:
            return False
        sequence.pages += [self._take() for _ in range(missing)]
        return True

    def wrote(self, sequence: SequencePages, keys: np.ndarray, length: int) -> bool:
        """Note that tokens up to ``length`` are written; full pages go into the tree.

        Args:
            keys: (≥ length) of the sequence's tokens.

        Returns:
            Whether a page of the sequence is another now, because the same was in the tree already.
        """
        sequence.length = length
        changed, size = False, self.page_tokens
        while (len(sequence.nodes) + 1) * size <= length:
            at = len(sequence.nodes)
            parent = sequence.nodes[-1] if sequence.nodes else sequence.root
            own = keys[at * size : (at + 1) * size]
            node = parent.child(own)
            if node is None:
                node = self._add(parent, own, sequence.pages[at])
            else:
                self._free.append(sequence.pages[at])
                sequence.pages[at] = node.page
                changed = True
            self._use(node)
            sequence.nodes.append(node)
        return changed

    def release(self, sequence: SequencePages, keys: np.ndarray | None = None) -> None:
        """Give back all pages of a sequence; it has none afterwards.

        Args:
            keys: of its tokens, to keep what is written of the last page too; None where that is not sure.
        """
        at = len(sequence.nodes)
        rest = sequence.pages[at:]
        if keys is not None and rest:
            own = keys[at * self.page_tokens : sequence.length]
            parent = sequence.nodes[-1] if sequence.nodes else sequence.root
            if len(own) and self._keep_part(parent, own, rest[0]):
                rest = rest[1:]
        self._free.extend(rest)
        for node in reversed(sequence.nodes):
            self._leave(node)
        sequence.pages, sequence.nodes, sequence.length = [], [], 0

    def _keep_part(self, parent: _Node, keys: np.ndarray, page: int) -> bool:
        """Put a page that is written in part into the tree, unless one there says as much."""
        nearest, common = parent.nearest(keys)
        if nearest is not None and common == len(keys):
            return False
        if nearest is not None and common == len(nearest.keys) < self.page_tokens and not nearest.users:
            self._remove(nearest)
        node = self._add(parent, keys.copy(), page)
        self._use(node)
        self._leave(node)
        return True

    def _add(self, parent: _Node, keys: np.ndarray, page: int) -> _Node:
        node = _Node(page, keys.copy(), parent)
        parent.children.setdefault(int(keys[0]), []).append(node)
        self._unused += 1
        return node

    def _use(self, node: _Node) -> None:
        self._unused -= node.users == 0
        node.users += 1

    def _leave(self, node: _Node) -> None:
        node.users -= 1
        if node.users == 0:
            self._unused += 1
            node.used = next(self._clock)
            self._offer(node)

    def _offer(self, node: _Node) -> None:
        """Note a page that may give way."""
        if not node.children and node.users == 0:
            heapq.heappush(self._oldest, (node.used, next(self._order), node))

    def _take(self) -> int:
        """A page to write, perhaps one that is given up for it; one must be ``available``."""
        while not self._free and self._oldest:
            used, _, node = heapq.heappop(self._oldest)
            if node.page >= 0 and node.users == 0 and not node.children and node.used == used:
                self._remove(node)
        return self._free.pop()

    def _remove(self, node: _Node) -> None:
        """Take a page without users and children out of the tree."""
        parent = node.parent
        assert parent is not None
        among = parent.children[int(node.keys[0])]
        among.remove(node)
        if not among:
            del parent.children[int(node.keys[0])]
        self._unused -= 1
        self._free.append(node.page)
        node.page = -1
        if parent.parent is not None:
            self._offer(parent)
