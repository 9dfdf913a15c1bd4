"""A process that runs somebody's code and answers questions, and that may be ended at any time.

The asking side is :class:`Worker`. The answering side is a module that is run as a program and calls
:func:`answer_requests`: it reads lines of JSON from standard input, and writes one line for each to what was standard
output, which the code itself cannot reach: what it prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

import psutil

from deltaw.errors import UserError, redact

Answering = Callable[[Any], dict[str, Any]]

# A line of an answer is at most so long.
_MOST_BYTES = 1 << 24
# Characters of an exception's text.
_LONGEST_TEXT = 2000
# Seconds that a worker may take to start, on a busy machine.
_TO_START = 60.0


class Worker:
    """A worker process that starts with the first request, and again with the first one after it was ended.

    Args:
        module: Module to run.
        settings: JSON, the only argument of the module.
        seconds: Time that the start may take in addition to the usual one.

    Attributes:
        failure: Why the last request has no answer, as the end of a sentence about the worker's code.
    """

    def __init__(self, module: str, settings: str, seconds: float) -> None:
        self._words = [sys.executable, "-m", module, settings]
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        self.failure = ""

    def ask(self, request: Any, seconds: float) -> dict[str, Any] | None:
        """Return the worker's answer, or None if it gave no usable one. In that case the worker is killed."""
        self.failure = f"gave no answer within {seconds:g} seconds, or ended its process"
        process = self._process or self._start()
        if process is None:
            return None
        line = json.dumps(request, default=str).encode() + b"\n"
        # A worker that does not read must not hold up who asks.
        threading.Thread(target=_write, args=(process.stdin, line), daemon=True).start()
        answer = self._next(seconds)
        with contextlib.suppress(ValueError, RecursionError):
            if answer.endswith(b"\n") and isinstance(found := json.loads(answer), dict):
                return found
            self.failure = "gave an answer that cannot be read" if answer else self.failure
        if len(answer) >= _MOST_BYTES:
            self.failure = f"gave an answer longer than {_MOST_BYTES >> 20} MiB"
        self.close()
        return None

    def close(self) -> None:
        """End the worker."""
        process, self._process = self._process, None
        if process is not None:
            end(process)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """A worker that is ready; None where it does not come to that."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(self._words, start_new_session=os.name != "nt", **pipes)
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        if self._next(_TO_START + self._seconds):
            return self._process
        self.close()
        return None

    def _next(self, seconds: float) -> bytes:
        """The next line; an empty one where none comes in time or at all."""
        with contextlib.suppress(queue.Empty):
            return self._answers.get(timeout=seconds)
        return b""


def _write(pipe: IO[bytes], line: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # the worker has ended, as whoever waits for an answer learns
        pipe.write(line)
        pipe.flush()


def _read(pipe: IO[bytes], answers: queue.Queue[bytes]) -> None:
    """Pass on lines until the pipe ends, which is an empty one."""
    while line := pipe.readline(_MOST_BYTES):
        answers.put(line)
    answers.put(b"")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants, including those that lead sessions of their own."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    if os.name != "nt":
        with contextlib.suppress(OSError):  # started meanwhile
            os.killpg(process.pid, 9)
    process.wait()
    psutil.wait_procs(family, timeout=5)


def answer_requests(make: Callable[[], Answering]) -> None:
    """Answer until standard input ends.

    Args:
        make: gives what answers a request; a UserError that it raises is the answer to each.
    """
    own = os.getpid()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        answering = make()
    except UserError as error:
        refused = {"error": error.what, "hint": error.hint}

        def answering(request: Any) -> dict[str, Any]:
            return refused

    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        answer = answering(json.loads(line))
        if os.getpid() != own:  # the code forked, and this is the other one
            os._exit(0)
        out.write(json.dumps(answer, default=lambda value: {"not JSON": repr(value)[:100]}).encode() + b"\n")
        out.flush()


def as_number(value: Any) -> Any:
    """Return the value as a float, or its text if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)[:100]


def described(error: Exception) -> str:
    """Return the type and the text of an exception of somebody's code, in bounded length and without secrets."""
    return redact(f"{type(error).__name__}: {str(error)[:_LONGEST_TEXT]}")
