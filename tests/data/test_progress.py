"""Progress is told seldom, with rate and time left, and not at all where reading is quick."""

from __future__ import annotations

import itertools

import pytest

from deltaw.data import report
from deltaw.data.report import Progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
    return clock


def test_lines_come_after_a_while_and_apart(clock: Clock) -> None:
    said: list[tuple[float, str]] = []
    told = Progress(lambda line: said.append((clock.now - 100, line)), "tokenizing d.jsonl", 5_000_000_000)
    for second in range(1, 41):
        clock.now = 100.0 + second
        told.at(second * 1000, second * 10_000_000)
    assert [when for when, _ in said] == [3, 8, 13, 18, 23, 28, 33, 38]
    assert said[1][1] == "tokenizing d.jsonl: 8,000 rows, 80 MB of 5.0 GB, 10.0 MB/s, 8 min left"


def test_a_long_reading_is_told_of_less_often(clock: Clock) -> None:
    said: list[float] = []
    told = Progress(lambda line: said.append(clock.now - 100), "reading", 0)
    for second in range(1, 3601):
        clock.now = 100.0 + second
        told.at(second, 0)
    assert len(said) < 160 and max(b - a for a, b in itertools.pairwise(said)) <= 30


def test_without_bytes_the_rows_are_told(clock: Clock) -> None:
    said: list[str] = []
    told = Progress(said.append, "reading owner/name", 0)
    clock.now = 104.0
    told.at(8000, 0)
    assert said == ["reading owner/name: 8,000 rows, 2,000 rows/s"]
