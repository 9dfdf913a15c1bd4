"""Pages are shared by sequences that begin alike, never lost, and never given to two that write."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.serving.pages import PagePool, SequencePages, token_keys, virtual_keys

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


def keys(*tokens: int) -> np.ndarray:
    return token_keys(np.array(tokens))


def test_a_prompt_that_begins_like_another_takes_its_full_pages_and_copies_the_last() -> None:
    memory = Memory(16)
    first = memory.run(token_keys(np.arange(30)))
    assert first is not None
    memory.pool.release(first, token_keys(np.arange(30)))
    other = np.concatenate([np.arange(29), [77, 78]])
    second = memory.run(token_keys(other))
    assert second is not None and second.reused == 29  # three pages, and five tokens of the fourth
    assert memory.copies == 1
    assert np.array_equal(memory.read(second, 31), other)


def test_pages_are_shared_while_both_sequences_run() -> None:
    memory = Memory(16)
    prompt = token_keys(np.arange(24))
    first, second = memory.run(prompt), memory.run(prompt)
    assert first is not None and second is not None
    assert second.pages[:2] == first.pages[:2] and second.reused == 23
    assert second.pages[2] == first.pages[2], "the page that both wrote is one afterwards"
    memory.pool.release(first, prompt)
    assert np.array_equal(memory.read(second, 24), prompt)


def test_tokens_of_another_adapter_are_never_taken_over() -> None:
    memory = Memory(16)
    tokens = np.arange(20)
    first = memory.run(token_keys(tokens, 1))
    assert first is not None
    memory.pool.release(first, token_keys(tokens, 1))
    assert memory.pool.begin(token_keys(tokens, 2)).reused == 0
    assert memory.pool.begin(token_keys(tokens)).reused == 0
    assert memory.pool.begin(token_keys(tokens, 1)).reused == 20
    soft = np.concatenate([virtual_keys(3, 1), token_keys(tokens)])
    assert memory.pool.begin(soft).reused == 0


def test_the_least_recently_used_pages_give_way_and_running_out_is_told() -> None:
    memory = Memory(4)
    for start in (100, 200):
        prompt = token_keys(np.arange(start, start + 16))
        sequence = memory.run(prompt)
        assert sequence is not None
        memory.pool.release(sequence, prompt)
    again = memory.pool.begin(token_keys(np.arange(100, 116)))  # the first is used anew
    memory.pool.release(again)
    third = memory.run(keys(*range(300, 310)))
    assert third is not None
    memory.pool.release(third)
    assert memory.pool.begin(token_keys(np.arange(200, 216))).reused == 0
    assert memory.pool.begin(token_keys(np.arange(100, 116))).reused == 16
    assert memory.run(token_keys(np.arange(500, 540))) is None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_page_is_lost_or_written_by_two_over_random_histories(data: st.DataObject) -> None:
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
