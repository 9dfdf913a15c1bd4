"""Tests of the page pool: pages are shared by sequences with equal prefixes, never lost, and written by one sequence
only.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.decoding.pages import PagePool, SavedStates, SequencePages, token_keys

SIZE = 8


class FakeMemory:
    """Contents of the pages: each cell stores the key that was written, which reveals wrong sharing."""

    def __init__(self, count: int) -> None:
        self.cells = np.full((count, SIZE), -1, np.int64)
        self.owners = np.zeros(count, np.int64)
        self.pool = PagePool(count, SIZE, self.copy)
        self.copies = 0

    def copy(self, source: int, target: int) -> None:
        self.copies += 1
        self.cells[target] = self.cells[source]
        self.owners[target] = self.owners[source]

    def write(self, sequence: SequencePages, keys: np.ndarray, start: int, stop: int) -> None:
        shared = len(sequence.nodes)
        for position in range(start, stop):
            assert position // SIZE >= shared, "a shared page was written"
            self.cells[sequence.pages[position // SIZE], position % SIZE] = keys[position]

    def read(self, sequence: SequencePages, length: int) -> np.ndarray:
        return self.cells[sequence.pages].reshape(-1)[:length]

    def run(self, keys: np.ndarray, owner: int = 0) -> SequencePages | None:
        """Write a sequence in chunks of 5 tokens."""
        sequence = self.pool.start_sequence(keys[:-1], owner)
        assert (self.owners[sequence.pages] == owner).all(), "a page of another owner was reused"
        while sequence.length < len(keys):
            start = sequence.length
            stop = min(len(keys), sequence.length + 5)
            if not self.pool.reserve(sequence, stop):
                self.pool.release(sequence, keys)
                return None
            self.write(sequence, keys, start, stop)
            self.owners[sequence.pages] = owner
            self.pool.commit(sequence, keys, stop)
        return sequence


def write_and_release(memory: FakeMemory, prompt: np.ndarray) -> SequencePages:
    """Write a sequence, release it and return its pages."""
    sequence = memory.run(prompt)
    assert sequence is not None
    memory.pool.release(sequence, prompt)
    return sequence


def key_range(start: int, stop: int) -> np.ndarray:
    return token_keys(np.arange(start, stop))


def test_shared_prefix_reuses_full_pages_and_copies_the_last():
    memory = FakeMemory(16)
    write_and_release(memory, key_range(0, 30))
    other = np.concatenate([np.arange(29), [77, 78]])
    second = memory.run(token_keys(other))
    assert second is not None and second.reused == 29  # three pages and five tokens of the fourth
    assert memory.copies == 1 and np.array_equal(memory.read(second, 31), other)


def test_running_sequences_share_pages():
    memory = FakeMemory(16)
    prompt = key_range(0, 24)
    first = memory.run(prompt)
    second = memory.run(prompt)
    assert first is not None and second is not None and second.reused == 23
    assert second.pages == first.pages, "pages with equal content must be merged"
    memory.pool.release(first, prompt)
    assert np.array_equal(memory.read(second, 24), prompt)


def test_least_recently_used_pages_are_evicted_until_none_is_free():
    memory = FakeMemory(4)
    for start in (100, 200):
        write_and_release(memory, key_range(start, start + 16))
    memory.pool.release(memory.pool.start_sequence(key_range(100, 116)))  # marks the first as recently used
    third = memory.run(key_range(300, 310))
    assert third is not None
    memory.pool.release(third)
    assert [memory.pool.start_sequence(key_range(start, start + 16)).reused for start in (200, 100)] == [0, 16]
    assert memory.run(key_range(500, 540)) is None
    single = FakeMemory(1)
    write_and_release(single, key_range(0, 5))
    assert single.pool.start_sequence(key_range(0, 4)).reused == 0, "a copy needs a free page"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_histories_never_lose_or_overwrite_pages(data):
    memory = FakeMemory(12)
    running: list[tuple[np.ndarray, SequencePages]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            keys, sequence = running.pop(data.draw(st.integers(0, len(running) - 1)))
            assert np.array_equal(memory.read(sequence, len(keys)), keys)
            memory.pool.release(sequence, keys if data.draw(st.booleans()) else None)
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=40))
            keys = token_keys(np.array(tokens), data.draw(st.integers(0, 1)))
            new_sequence = memory.run(keys, data.draw(st.integers(0, 1)))
            if new_sequence is not None:
                running.append((keys, new_sequence))
    for keys, sequence in running:
        assert np.array_equal(memory.read(sequence, len(keys)), keys)
        memory.pool.release(sequence, keys)
    assert memory.pool.available == 12
    filler = memory.pool.start_sequence(token_keys(np.empty(0, np.int64)))
    assert memory.pool.reserve(filler, 12 * SIZE)
    assert sorted(filler.pages) == list(range(12))


def test_saved_states_are_limited_and_removed_with_their_pages():
    pool = PagePool(6, SIZE, lambda source, target: None, SavedStates(2 * 16))

    def write(seed: int, pages: int, in_completion: bool = False) -> np.ndarray:
        keys = token_keys(np.random.default_rng(seed).integers(0, 99, pages * SIZE))
        sequence = pool.start_sequence(keys)
        for stop in range(sequence.length + SIZE, len(keys) + 1, SIZE):
            assert pool.reserve(sequence, stop)
            pool.commit(sequence, keys, stop)
            if in_completion or stop == len(keys):
                pool.save_state(sequence, torch.full((4,), float(10 * seed + stop // SIZE)), in_completion)
        pool.release(sequence)
        return keys

    def state_at(keys: np.ndarray) -> tuple[int, float | None]:
        sequence = pool.start_sequence(keys)
        pool.release(sequence)
        return sequence.reused, None if sequence.state is None else float(sequence.state[0])

    first, second = write(1, 2), write(2, 1)
    assert state_at(first) == (2 * SIZE, 12.0) and state_at(first[:SIZE]) == (0, None)
    third = write(3, 2, in_completion=True)
    assert state_at(third) == (0, None), "a completion evicts no other state"
    assert state_at(second) == (SIZE, 21.0)
    fourth = write(4, 1)
    assert state_at(first) == (0, None), "the state that was used least recently is evicted"
    assert state_at(fourth) == (SIZE, 41.0) and state_at(second) == (SIZE, 21.0)
    write(5, 6)
    assert state_at(fourth) == state_at(second) == (0, None), "their pages were evicted"
    sequence = pool.start_sequence(write(5, 6))
    pool.states.drop(sequence.nodes[-1])
    pool.release(sequence)
    last = write(6, 3, in_completion=True)
    assert state_at(last) == (3 * SIZE, 63.0) and state_at(last[: 2 * SIZE]) == (0, None)
