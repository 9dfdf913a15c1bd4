"""Waiting for what a server does in its own time, and asking it from many threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# After so long it is not going to happen; only a failing test waits for it.
SECONDS = 30.0
Given, Made = TypeVar("Given"), TypeVar("Made")


def until(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes to hold."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def at_once(work: Callable[[Given], Made], given: Iterable[Given]) -> list[Made]:
    """What the work makes of each of these, each in a thread of its own."""
    parts = list(given)
    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(work, parts))
