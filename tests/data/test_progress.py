"""Progress is logged at increasing intervals, with rate and remaining time, and not for fast reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from deltaw.data import read_progress
from deltaw.data.read_progress import ReadProgress


@pytest.fixture
def log_progress(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, str]]]:
    """Return (seconds, line) of each logged line for a constant rate of rows and bytes."""

    def lines(title: str, size: int, seconds: range, rows: int, size_read: int = 0) -> list[tuple[int, str]]:
        clock = SimpleNamespace(now=0.0)
        logged = []
        monkeypatch.setattr(read_progress, "time", SimpleNamespace(monotonic=lambda: 100.0 + clock.now))
        progress = ReadProgress(lambda line: logged.append((clock.now, line)), title, size)
        for clock.now in seconds:
            progress.update(clock.now * rows, clock.now * size_read)
        return logged

    return lines


def test_lines_are_logged_at_intervals(log_progress) -> None:
    logged = log_progress("tokenizing d.jsonl", 5_000_000_000, range(1, 41), 1000, 10_000_000)
    assert [when for when, _ in logged] == [3, 8, 13, 18, 23, 28, 33, 38]
    assert logged[1][1] == "tokenizing d.jsonl: 8,000 rows, 80 MB of 5.0 GB, 10.0 MB/s, 8 min left"


def test_long_reads_log_less_often_and_in_rows_without_a_size(log_progress) -> None:
    times = [when for when, _ in log_progress("reading", 0, range(1, 3601), 1)]
    assert len(times) < 160 and max(b - a for a, b in itertools.pairwise(times)) <= 30
    lines = log_progress("reading owner/name", 0, range(4, 5), 2000)
    assert lines == [(4, "reading owner/name: 8,000 rows, 2,000 rows/s")]
