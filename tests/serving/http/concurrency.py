"""Helpers that wait for a condition and run functions in many threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

# Time limit in seconds. Only a failing test waits that long.
SECONDS = 30.0
Item = TypeVar("Given")
Result = TypeVar("Made")


def wait_until(condition: Callable[[], bool]) -> bool:
    """Wait for a condition. Return False on timeout."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def run_in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call a function with each item in a separate thread and return the results in order."""
    arguments = list(items)
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(function, arguments))
