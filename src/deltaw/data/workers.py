"""Work on many items by several processes, its results in the order of the items.

Processes are forked, so they share what is in memory already and begin at once. They run Python alone: no
operator of torch, whose threads a forked process does not have. It knows neither rows nor tokens.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from deltaw.errors import UserError
from deltaw.host.processor import usable_processors

# More processes than this are kept waiting by the one that reads and writes.
MOST = 8
# A process whose parent is gone notices after so many seconds.
_ALONE_SECONDS = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def processes() -> int:
    """How many processes may work at once: one where processes cannot be forked safely, or where the variable
    TOKENIZERS_PARALLELISM forbids it."""
    asked = os.environ.get("TOKENIZERS_PARALLELISM", "").lower()
    if sys.platform != "linux" or asked in ("0", "false", "no", "off", "f", "n"):
        return 1
    return max(1, min(MOST, len(usable_processors())))


def in_order(items: Iterable[Item], work: Callable[[Item], Result], count: int) -> Iterator[Result]:
    """``work`` of each item, in order, by ``count`` processes; by this one alone if that is 1.

    Items are taken as they are needed, so that few of them are in memory.

    Raises:
        UserError: work raised it, or a process was ended from outside. Other errors come as RuntimeError with
            the text of the process's traceback.
    """
    if count <= 1:
        yield from map(work, items)
        return
    workers = [_Worker(work) for _ in range(count)]
    try:
        yield from _in_order(items, workers)
    finally:
        for worker in workers:
            worker.close()


def _in_order(items: Iterable[Item], workers: list[_Worker]) -> Iterator[Any]:
    left = iter(items)
    free = deque(workers)
    done: dict[int, Any] = {}
    numbers: dict[_Worker, int] = {}
    given = taken = 0
    ended = False
    while True:
        while free and not ended and given - taken < 2 * len(workers):
            try:
                item = next(left)
            except StopIteration:
                ended = True
                break
            worker = free.popleft()
            worker.give(item)
            numbers[worker] = given
            given += 1
        if ended and given == taken:
            return
        busy = {worker.connection: worker for worker in numbers}
        for connection in wait(list(busy)) if taken not in done else []:
            worker = busy[connection]  # type: ignore[index]
            done[numbers.pop(worker)] = worker.take()
            free.append(worker)
        while taken in done:
            result = done.pop(taken)
            taken += 1
            yield result


class _Worker:
    """One process, and the connection to it."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads: theirs are not used there
            self._process.start()
        theirs.close()

    def give(self, item: object) -> None:
        try:
            self.connection.send(item)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone() from error

    def take(self) -> Any:
        try:
            kind, result = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._gone() from error
        if kind == "done":
            return result
        if kind == "user":
            error_type, state = result
            told: UserError = error_type.__new__(error_type)
            told.args, told.__dict__ = state
            raise told
        raise RuntimeError(f"a process that reads rows failed:\n{result}")

    def _gone(self) -> UserError:
        self._process.join(5)
        return UserError(
            f"a process that reads rows was ended (status {self._process.exitcode})",
            hint="if memory ran out, set the environment variable TOKENIZERS_PARALLELISM=false: one process "
            "needs less",
        )

    def close(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(5)


def _serve(connection: Connection, work: Callable[[Any], Any], parent: int) -> None:
    """Work on items until there are no more, or nobody waits for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one thread
    while True:
        while not connection.poll(_ALONE_SECONDS):
            if os.getppid() != parent:
                os._exit(1)
        try:
            item = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer: tuple[str, Any] = ("done", work(item))
        except UserError as error:
            answer = ("user", (type(error), (error.args, error.__dict__)))
        except BaseException:
            answer = ("failed", traceback.format_exc())
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)
