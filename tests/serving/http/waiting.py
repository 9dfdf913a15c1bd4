"""Waiting for what a server does in its own time."""

from __future__ import annotations

import time
from collections.abc import Callable

# After so long it is not going to happen; only a failing test waits for it.
SECONDS = 30.0


def until(condition: Callable[[], bool]) -> bool:
    """Whether a condition comes to hold."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
