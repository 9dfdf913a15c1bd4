"""Progress is told seldom, with rate and time left, and not at all where reading is quick."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from deltaw.data import report
from deltaw.data.report import Progress


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, str]]]:
    """What is said, and after how many seconds, where rows and bytes are told at these seconds."""

    def lines(what: str, size: int, seconds: range, rows: int, size_read: int = 0) -> list[tuple[int, str]]:
        clock, said = SimpleNamespace(now=0.0), []
        monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=lambda: 100.0 + clock.now))
        progress = Progress(lambda line: said.append((clock.now, line)), what, size)
        for clock.now in seconds:
            progress.at(clock.now * rows, clock.now * size_read)
        return said

    return lines


def test_lines_come_after_a_while_and_apart(told) -> None:
    said = told("tokenizing d.jsonl", 5_000_000_000, range(1, 41), 1000, 10_000_000)
    assert [when for when, _ in said] == [3, 8, 13, 18, 23, 28, 33, 38]
    assert said[1][1] == "tokenizing d.jsonl: 8,000 rows, 80 MB of 5.0 GB, 10.0 MB/s, 8 min left"


def test_a_long_reading_is_told_of_less_often_and_in_rows_where_no_bytes_are_known(told) -> None:
    times = [when for when, _ in told("reading", 0, range(1, 3601), 1)]
    assert len(times) < 160 and max(b - a for a, b in itertools.pairwise(times)) <= 30
    assert told("reading owner/name", 0, range(4, 5), 2000) == [(4, "reading owner/name: 8,000 rows, 2,000 rows/s")]
