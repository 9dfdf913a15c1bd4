"""Ordered parallel map over forked processes.

Worker processes are forked, so that they share memory and start immediately. They must not call operators of torch,
whose threads do not exist after a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from deltaw.errors import UserError
from deltaw.machine.choices import usable_processors

# Maximum number of worker processes. More would wait for the process that reads and writes.
MAX_PROCESSES = 8
# Interval in seconds at which a worker checks that its parent is alive.
_PARENT_CHECK_SECONDS = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_processes() -> int:
    """Return the number of worker processes: 1 if forking is unsafe or disabled by TOKENIZERS_PARALLELISM."""
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if sys.platform != "linux" or parallelism in ("0", "false", "no", "off", "f", "n"):
        return 1
    return max(1, min(MAX_PROCESSES, len(usable_processors())))


def in_order(items: Iterable[Item], work: Callable[[Item], Result], count: int) -> Iterator[Result]:
    """Yield ``work(item)`` for each item in order, computed by ``count`` processes, or by this process if ``count`` is
    1.

    Items are consumed lazily, so that only some are in memory.

    Raises:
        UserError: if a process was killed.
        Exception: raised by ``work``. Its cause contains the traceback of the process.
    """
    if count <= 1:
        yield from map(work, items)
        return
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, fork, initializer=_start_worker, initargs=(work, os.getpid()))
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            with warnings.catch_warnings():
                # The warning is about forking with threads, which workers do not use.
                warnings.simplefilter("ignore", DeprecationWarning)
                waiting.append(pool.submit(_run_work, item))
            if len(waiting) == 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        hint = "if memory ran out, set the environment variable TOKENIZERS_PARALLELISM=false: one process needs less"
        raise UserError("a process that reads rows was killed", hint=hint) from error
    finally:
        pool.shutdown(cancel_futures=True)


# The function that a worker process runs.
_work: Callable[[Any], Any]


def _start_worker(work: Callable[[Any], Any], parent: int) -> None:
    """Initialize a worker process."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one thread
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exit soon after the parent process, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)


def _run_work(item: Any) -> Any:
    return _work(item)
