"""Page pool with a prefix cache: assigns pages of keys and values to sequences and evicts unused ones.

A token is represented by an integer key that identifies its id and the adapter that acts on it (:func:`token_keys`).
Together with the preceding tokens it determines the cached keys and values. Full pages are stored in a tree by their
keys. A new sequence shares the pages of its longest cached prefix. If the prefix ends inside a page, that page is
copied, because pages in the tree are never written again. Each owner has a separate tree, so that no owner can
observe the prompts of another.

Unused pages stay cached until they are needed. They are evicted in least-recently-used order, children before parents.

Recurrent layers have one state per sequence instead of keys and values per token. A sequence can only continue from a
position whose state is saved. States are large, so only few are saved, at ends of pages (:class:`SavedStates`): where
a prompt ends, where a prompt leaves the path of another, and the last one of a completion.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

# Minimum fraction of a page that must match for a copy to be worthwhile.
MIN_COPIED = 1 / 8
_VIRTUAL = 1 << 31


def token_keys(tokens: np.ndarray, adapter: int = 0) -> np.ndarray:
    """Return (n,) int64 cache keys of (n,) token ids.

    Args:
        tokens: Token ids.
        adapter: Number of the adapter that acts on the tokens, or 0 for none.
    """
    keys: np.ndarray = tokens.astype(np.int64) + (adapter << 32)
    return keys


def virtual_keys(count: int, adapter: int) -> np.ndarray:
    """Return (count,) cache keys of the virtual tokens of an adapter's soft prompt."""
    return token_keys(np.arange(count, dtype=np.int64) + _VIRTUAL, adapter)


@dataclass(eq=False)
class _Node:
    """Page in the prefix tree: a full page, or a partial last page of a finished sequence."""

    page: int
    keys: np.ndarray
    parent: _Node | None
    users: int = 0
    last_used: int = 0
    # By first key.
    children: dict[int, list[_Node]] = field(default_factory=dict)

    def child(self, keys: np.ndarray) -> _Node | None:
        """Return the child with exactly these keys, or None."""
        for node in self.children.get(int(keys[0]), ()):
            if len(node.keys) == len(keys) and np.array_equal(node.keys, keys):
                return node
        return None

    def nearest(self, keys: np.ndarray) -> tuple[_Node | None, int]:
        """Return the child with the longest common prefix with ``keys``, and the length of that prefix."""
        best: _Node | None = None
        length = 0
        for node in self.children.get(int(keys[0]), ()):
            common = _common(node.keys, keys)
            if common > length:
                best = node
                length = common
        return best, length


def _common(left: np.ndarray, right: np.ndarray) -> int:
    """Return the length of the common prefix of two key sequences."""
    length = min(len(left), len(right))
    mismatches = np.flatnonzero(left[:length] != right[:length])
    return int(mismatches[0]) if mismatches.size else length


@dataclass(eq=False)
class SequencePages:
    """Pages of one sequence, in order.

    Attributes:
        root: Root of the prefix tree that the sequence uses.
        pages: Page numbers. The first ``len(nodes)`` pages are in the tree.
        length: Number of tokens whose keys and values are computed.
        reused: Number of tokens that were cached when the sequence started.
        nodes: Tree nodes of the first pages.
        matched: Number of tokens in full cached pages when the sequence started. Larger than ``reused`` if no state is
            saved at their end.
        state: State after the reused tokens, or None for the state before a sequence.
        completion_state: Node with the last saved state of the completion.
    """

    root: _Node = field(repr=False)
    pages: list[int] = field(default_factory=list)
    length: int = 0
    reused: int = 0
    nodes: list[_Node] = field(default_factory=list, repr=False)
    matched: int = 0
    state: Tensor | None = field(default=None, repr=False)
    completion_state: _Node | None = field(default=None, repr=False)


class SavedStates:
    """States after pages of the prefix tree, evicted in least-recently-used order.

    Args:
        limit: Maximum size of all states, in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._states: dict[_Node, Tensor] = {}  # least recently used first

    def __contains__(self, node: _Node) -> bool:
        return node in self._states

    def use(self, node: _Node) -> Tensor:
        """Return the state after a page."""
        state = self._states[node] = self._states.pop(node)
        return state

    def save(self, node: _Node, state: Tensor, evict: bool) -> bool:
        """Save a copy of the state after a page, if it fits into the limit.

        Args:
            node: The page.
            state: The state.
            evict: True to evict other states.

        Returns:
            True if the state is saved.
        """
        if node in self._states:
            self.use(node)
            return True
        while evict and state.nbytes > self._free and self._states:
            self.drop(next(iter(self._states)))
        if state.nbytes > self._free:
            return False
        self._states[node] = state.clone()
        self._free -= state.nbytes
        return True

    def drop(self, node: _Node) -> None:
        """Delete the state after a page, if it is saved."""
        state = self._states.pop(node, None)
        self._free += 0 if state is None else state.nbytes


class PagePool:
    """All pages of an engine.

    Args:
        count: Number of pages.
        page_tokens: Tokens per page.
        copy: Copies the contents of a page to another page.
        states: Saved states if the model has recurrent layers, else None.

    Attributes:
        reused: Number of tokens served from the cache since the start.
    """

    def __init__(
        self, count: int, page_tokens: int, copy: Callable[[int, int], None], states: SavedStates | None = None
    ) -> None:
        self.count = count
        self.page_tokens = page_tokens
        self.reused = 0
        self.states = states
        self._copy = copy
        self._free = list(range(count - 1, -1, -1))
        self._roots: dict[int, _Node] = {}
        self._num_unused = 0  # nodes without users
        self._clock = itertools.count(1)
        self._evictable: list[tuple[int, int, _Node]] = []
        self._order = itertools.count()

    @property
    def available(self) -> int:
        """Number of free and evictable pages."""
        return len(self._free) + self._num_unused

    def start_sequence(self, keys: np.ndarray, owner: int = 0) -> SequencePages:
        """Create the pages of a new sequence, starting with its longest cached prefix.

        Args:
            keys: Keys of the tokens that may be reused. Exclude the last token of a prompt if its logits are needed.
            owner: Owner of the sequence. Pages are only shared within an owner.
        """
        root = self._roots.setdefault(owner, _Node(-1, np.empty(0, np.int64), None))
        sequence = SequencePages(root)
        size = self.page_tokens
        path: list[_Node] = []
        while (len(path) + 1) * size <= len(keys):
            child = (path[-1] if path else root).child(keys[len(path) * size : (len(path) + 1) * size])
            if child is None:
                break
            path.append(child)
        sequence.matched = len(path) * size
        if self.states is not None:
            while path and path[-1] not in self.states:
                path.pop()
            sequence.state = self.states.use(path[-1]) if path else None
        for node in path:
            self._ref(node)
        sequence.nodes = path
        sequence.pages = [node.page for node in path]
        position = len(path) * size
        if self.states is None and position < len(keys):
            position += self._copy_partial(sequence, path[-1] if path else root, keys[position:])
        sequence.length = sequence.reused = position
        self.reused += position
        return sequence

    def _copy_partial(self, sequence: SequencePages, node: _Node, keys: np.ndarray) -> int:
        """Append a copy of the page below ``node`` that shares the longest prefix with ``keys``.

        Returns:
            Number of tokens reused from the copy.
        """
        nearest, common = node.nearest(keys[: self.page_tokens])
        if nearest is None or common < max(1, self.page_tokens * MIN_COPIED):
            return 0
        self._ref(nearest)  # protect it from eviction by its own copy
        page = self._allocate() if self.available else None
        self._unref(nearest)
        if page is None:
            return 0
        self._copy(nearest.page, page)
        sequence.pages.append(page)
        return common

    def reserve(self, sequence: SequencePages, length: int) -> bool:
        """Extend a sequence to ``length`` tokens. Return False, without changes, if too few pages are available."""
        missing = -(-length // self.page_tokens) - len(sequence.pages)
        if missing > self.available:
            return False
        sequence.pages += [self._allocate() for _ in range(missing)]
        return True

    def commit(self, sequence: SequencePages, keys: np.ndarray, length: int) -> bool:
        """Record that the tokens up to ``length`` are computed, and add full pages to the tree.

        Args:
            sequence: The sequence.
            keys: (at least ``length``,) keys of its tokens.
            length: Number of computed tokens.

        Returns:
            True if a page number of the sequence changed because the tree already contained the same page.
        """
        sequence.length = length
        changed = False
        size = self.page_tokens
        while (len(sequence.nodes) + 1) * size <= length:
            index = len(sequence.nodes)
            parent = sequence.nodes[-1] if sequence.nodes else sequence.root
            page_keys = keys[index * size : (index + 1) * size]
            node = parent.child(page_keys)
            if node is None:
                node = self._add(parent, page_keys, sequence.pages[index])
            else:
                self._free.append(sequence.pages[index])
                sequence.pages[index] = node.page
                changed = True
            self._ref(node)
            sequence.nodes.append(node)
        return changed

    def save_state(self, sequence: SequencePages, state: Tensor, in_completion: bool) -> None:
        """Save the state of a sequence whose tokens fill its pages.

        Args:
            sequence: The sequence. All of its pages are in the tree.
            state: State after its tokens.
            in_completion: True to replace the previous state in the completion, without evicting other states.
        """
        assert self.states is not None
        node = sequence.nodes[-1]
        is_new = node not in self.states
        is_saved = self.states.save(node, state, evict=not in_completion)
        if in_completion and is_saved and is_new:
            if sequence.completion_state is not None:
                self.states.drop(sequence.completion_state)
            sequence.completion_state = node

    def release(self, sequence: SequencePages, keys: np.ndarray | None = None) -> None:
        """Release all pages of a sequence.

        Args:
            sequence: The sequence. It has no pages afterwards.
            keys: Keys of its tokens, to cache its partial last page too. None if the page contents may be invalid.
        """
        index = len(sequence.nodes)
        rest = sequence.pages[index:]
        if keys is not None and rest and self.states is None:
            tail_keys = keys[index * self.page_tokens : sequence.length]
            parent = sequence.nodes[-1] if sequence.nodes else sequence.root
            if len(tail_keys) and self._cache_partial(parent, tail_keys, rest[0]):
                rest = rest[1:]
        self._free.extend(rest)
        for node in reversed(sequence.nodes):
            self._unref(node)
        sequence.pages = []
        sequence.nodes = []
        sequence.length = 0

    def _cache_partial(self, parent: _Node, keys: np.ndarray, page: int) -> bool:
        """Add a partial page to the tree. Return False if the tree already contains its tokens."""
        nearest, common = parent.nearest(keys)
        if nearest is not None and common == len(keys):
            return False
        if nearest is not None and common == len(nearest.keys) < self.page_tokens and not nearest.users:
            self._remove(nearest)
        node = self._add(parent, keys.copy(), page)
        self._ref(node)
        self._unref(node)
        return True

    def _add(self, parent: _Node, keys: np.ndarray, page: int) -> _Node:
        node = _Node(page, keys.copy(), parent)
        parent.children.setdefault(int(keys[0]), []).append(node)
        self._num_unused += 1
        return node

    def _ref(self, node: _Node) -> None:
        self._num_unused -= node.users == 0
        node.users += 1

    def _unref(self, node: _Node) -> None:
        node.users -= 1
        if node.users == 0:
            self._num_unused += 1
            node.last_used = next(self._clock)
            self._offer_eviction(node)

    def _offer_eviction(self, node: _Node) -> None:
        """Mark a page as evictable if it is an unused leaf."""
        if not node.children and node.users == 0:
            heapq.heappush(self._evictable, (node.last_used, next(self._order), node))

    def _allocate(self) -> int:
        """Return a free page, evicting cached pages if necessary. The caller must check :attr:`available`."""
        while not self._free and self._evictable:
            used, _, node = heapq.heappop(self._evictable)
            if node.page >= 0 and node.users == 0 and not node.children and node.last_used == used:
                self._remove(node)
        return self._free.pop()

    def _remove(self, node: _Node) -> None:
        """Remove an unused leaf from the tree and free its page."""
        parent = node.parent
        assert parent is not None
        siblings = parent.children[int(node.keys[0])]
        siblings.remove(node)
        if not siblings:
            del parent.children[int(node.keys[0])]
        self._num_unused -= 1
        if self.states is not None:
            self.states.drop(node)
        self._free.append(node.page)
        node.page = -1
        if parent.parent is not None:
            self._offer_eviction(parent)
