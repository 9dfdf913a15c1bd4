"""Waiting for what a server does in its own time, and asking it from many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

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


def at_once(work: Callable[..., object], given: Iterable[object]) -> None:
    """Do the work for each of these in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=work, args=(one,)) for one in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
