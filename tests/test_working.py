"""Long work tells whoever listens, and nobody otherwise."""

from __future__ import annotations

import threading

import pytest

from deltaw.working import listen, listening, working


class Heard:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def began(self, what: str, total: float | None) -> None:
        self.told.append((what, total))

    def advanced(self, done: float) -> None:
        self.told.append(done)

    def ended(self) -> None:
        self.told.append("end")


@working("adding")
def add(a: int, b: int) -> int:
    return a + b


def test_a_listener_hears_begin_progress_and_end_also_of_work_that_fails() -> None:
    heard = Heard()
    with listening(heard), pytest.raises(KeyError), working("reading", 4) as advance:
        advance(2)
        raise KeyError
    assert heard.told == [("reading", 4), 2, "end"]


def test_without_a_listener_and_in_another_thread_nothing_is_told() -> None:
    with working("reading") as advance:
        advance(1)
    heard = Heard()
    with listening(heard):
        with listening(None):
            add(1, 2)
        thread = threading.Thread(target=add, args=(1, 2))
        thread.start()
        thread.join()
    assert heard.told == []


def test_a_listener_stays_up_to_the_end_of_the_block_and_hears_decorated_functions() -> None:
    first, later = Heard(), Heard()
    with listening(first):
        listen(later)
        assert add(1, 2) == add(2, 1) == 3
    with working("b"):
        pass
    assert first.told == [] and later.told == [("adding", None), "end"] * 2
