"""Progress of long work is reported to the registered listener."""

from __future__ import annotations

import threading

import pytest

from deltaw.progress import set_listener, track_progress, use_listener


class RecordingListener:
    """A listener that records its calls."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def started(self, title: str, total: float | None) -> None:
        self.events.append((title, total))

    def advance(self, done: float) -> None:
        self.events.append(done)

    def finished(self) -> None:
        self.events.append("end")


@track_progress("adding")
def add(a: int, b: int) -> int:
    return a + b


def test_listener_receives_start_progress_and_end_on_failure() -> None:
    listener = RecordingListener()
    with use_listener(listener), pytest.raises(KeyError), track_progress("reading", 4) as advance:
        advance(2)
        raise KeyError
    assert listener.events == [("reading", 4), 2, "end"]


def test_no_report_without_listener_or_in_another_thread() -> None:
    with track_progress("reading") as advance:
        advance(1)
    listener = RecordingListener()
    with use_listener(listener):
        with use_listener(None):
            add(1, 2)
        thread = threading.Thread(target=add, args=(1, 2))
        thread.start()
        thread.join()
    assert listener.events == []


def test_listener_is_active_in_its_block_and_for_decorated_functions() -> None:
    first = RecordingListener()
    later = RecordingListener()
    with use_listener(first):
        set_listener(later)
        assert add(1, 2) == add(2, 1) == 3
    with track_progress("b"):
        pass
    assert first.events == [] and later.events == [("adding", None), "end"] * 2
