"""Pages are shared by sequences that begin alike, never lost, and never given to two that write."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.serving.pages import PagePool, SequencePages, token_keys

SIZE = 8


class Memory:
    """What pages hold: the keys that were written, so that wrong sharing shows."""

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
        for at in range(start, stop):
            assert at // SIZE >= shared, "a shared page is written"
            self.cells[sequence.pages[at // SIZE], at % SIZE] = keys[at]

    def read(self, sequence: SequencePages, length: int) -> np.ndarray:
        return self.cells[sequence.pages].reshape(-1)[:length]

    def run(self, keys: np.ndarray, owner: int = 0) -> SequencePages | None:
        """Write a whole sequence, in chunks of 5."""
        sequence = self.pool.begin(keys[:-1], owner)
        assert (self.owners[sequence.pages] == owner).all(), "somebody finds what others wrote"
        while sequence.length < len(keys):
            start, stop = sequence.length, min(len(keys), sequence.length + 5)
            if not self.pool.reserve(sequence, stop):
                self.pool.release(sequence, keys)
                return None
            self.write(sequence, keys, start, stop)
            self.owners[sequence.pages] = owner
            self.pool.wrote(sequence, keys, stop)
        return sequence


def written(memory: Memory, prompt: np.ndarray) -> SequencePages:
    """The pages of a sequence that was written and given back."""
    sequence = memory.run(prompt)
    assert sequence is not None
    memory.pool.release(sequence, prompt)
    return sequence


def counted(start: int, stop: int) -> np.ndarray:
    return token_keys(np.arange(start, stop))


def test_a_prompt_that_begins_like_another_takes_its_full_pages_and_copies_the_last():
    memory = Memory(16)
    written(memory, counted(0, 30))
    other = np.concatenate([np.arange(29), [77, 78]])
    second = memory.run(token_keys(other))
    assert second is not None and second.reused == 29  # three pages, and five tokens of the fourth
    assert memory.copies == 1 and np.array_equal(memory.read(second, 31), other)


def test_pages_are_shared_while_both_sequences_run():
    memory, prompt = Memory(16), counted(0, 24)
    first, second = memory.run(prompt), memory.run(prompt)
    assert first is not None and second is not None and second.reused == 23
    assert second.pages == first.pages, "the page that both wrote is one afterwards"
    memory.pool.release(first, prompt)
    assert np.array_equal(memory.read(second, 24), prompt)


def test_the_least_recently_used_pages_give_way_and_running_out_is_told():
    memory = Memory(4)
    for start in (100, 200):
        written(memory, counted(start, start + 16))
    memory.pool.release(memory.pool.begin(counted(100, 116)))  # the first is used anew
    third = memory.run(counted(300, 310))
    assert third is not None
    memory.pool.release(third)
    assert [memory.pool.begin(counted(start, start + 16)).reused for start in (200, 100)] == [0, 16]
    assert memory.run(counted(500, 540)) is None
    one = Memory(1)
    written(one, counted(0, 5))
    assert one.pool.begin(counted(0, 4)).reused == 0, "no page is left for a copy"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_page_is_lost_or_written_by_two_over_random_histories(data):
    memory = Memory(12)
    running: list[tuple[np.ndarray, SequencePages]] = []
    for _ in range(data.draw(st.integers(1, 25))):
        if running and data.draw(st.booleans()):
            ours, sequence = running.pop(data.draw(st.integers(0, len(running) - 1)))
            assert np.array_equal(memory.read(sequence, len(ours)), ours)
            memory.pool.release(sequence, ours if data.draw(st.booleans()) else None)
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=40))
            ours = token_keys(np.array(tokens), data.draw(st.integers(0, 1)))
            made = memory.run(ours, data.draw(st.integers(0, 1)))
            if made is not None:
                running.append((ours, made))
    for ours, sequence in running:
        assert np.array_equal(memory.read(sequence, len(ours)), ours)
        memory.pool.release(sequence, ours)
    assert memory.pool.available == 12
    filler = memory.pool.begin(token_keys(np.empty(0, np.int64)))
    assert memory.pool.reserve(filler, 12 * SIZE)
    assert sorted(filler.pages) == list(range(12))
