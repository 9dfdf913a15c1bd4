"""Worker processes that run user code, answer requests, and can be killed at any time.

:class:`RewardWorker` starts a worker and sends requests. The worker is a module that runs as a program and calls
:func:`answer_requests`. It reads lines of JSON from standard input and writes one line per request to the original
standard output. Output of the user code is redirected to standard error.
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

RequestHandler = Callable[[Any], dict[str, Any]]

# Maximum length of an answer.
_MAX_ANSWER_BYTES = 1 << 24
# Maximum number of characters of an exception's text.
_MAX_TEXT_LENGTH = 2000
# Default time limit for the start of a worker, long enough for a busy machine.
_START_SECONDS = 60.0


class RewardWorker:
    """A worker process. It starts at the first request, and again at the first request after it was killed.

    Args:
        module: Module to run.
        settings: JSON text, passed to the module as its only command-line argument.
        extra_start_seconds: Time allowed for the start, in addition to the default.

    Attributes:
        failure: Why the last request has no answer, as a verb phrase: "gave an answer that cannot be read".
    """

    def __init__(self, module: str, settings: str, extra_start_seconds: float) -> None:
        self._words = [sys.executable, "-m", module, settings]
        self._seconds = extra_start_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        self.failure = ""

    def request(self, request: Any, seconds: float) -> dict[str, Any] | None:
        """Send a request and return the worker's answer.

        If the answer is missing or invalid, set ``failure``, kill the worker and return None.

        Args:
            request: JSON-serializable value. Other objects are converted with ``str``.
            seconds: Time limit for the answer.
        """
        self.failure = f"gave no answer within {seconds:g} seconds, or its process exited"
        process = self._process or self._start()
        if process is None:
            return None
        line = json.dumps(request, default=str).encode() + b"\n"
        # Write in a thread, because a worker that does not read would block the caller.
        threading.Thread(target=_write, args=(process.stdin, line), daemon=True).start()
        answer = self._next(seconds)
        with contextlib.suppress(ValueError, RecursionError):
            if answer.endswith(b"\n") and isinstance(result := json.loads(answer), dict):
                return result
            self.failure = "gave an answer that cannot be read" if answer else self.failure
        if len(answer) >= _MAX_ANSWER_BYTES:
            self.failure = f"gave an answer longer than {_MAX_ANSWER_BYTES >> 20} MiB"
        self.close()
        return None

    def close(self) -> None:
        """Kill the worker."""
        process, self._process = self._process, None
        if process is not None:
            kill_process_tree(process)

    def _start(self) -> subprocess.Popen[bytes] | None:
        """Start a worker and wait until it is ready. Return None if it does not become ready in time."""
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(self._words, start_new_session=os.name != "nt", **pipes)
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        if self._next(_START_SECONDS + self._seconds):
            return self._process
        self.close()
        return None

    def _next(self, seconds: float) -> bytes:
        """Return the next line, or an empty line after a timeout or the end of the stream."""
        with contextlib.suppress(queue.Empty):
            return self._answers.get(timeout=seconds)
        return b""


def _write(pipe: IO[bytes], line: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # the worker has exited, and the reader of its answers will notice
        pipe.write(line)
        pipe.flush()


def _read(pipe: IO[bytes], answers: queue.Queue[bytes]) -> None:
    """Put lines into the queue until the pipe closes, then an empty line."""
    while line := pipe.readline(_MAX_ANSWER_BYTES):
        answers.put(line)
    answers.put(b"")


def kill_process_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its descendants, including those in separate sessions."""
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        processes = [parent, *parent.children(recursive=True)]
    for member_process in processes:
        with contextlib.suppress(psutil.Error):
            member_process.kill()
    if os.name != "nt":
        with contextlib.suppress(OSError):  # also kill processes that were started after the listing
            os.killpg(process.pid, 9)
    process.wait()
    psutil.wait_procs(processes, timeout=5)


def answer_requests(make_handler: Callable[[], RequestHandler]) -> None:
    """Answer requests from standard input until it is closed. Standard output is redirected to standard error.

    Args:
        make_handler: Returns the handler of requests. If it raises UserError, the error is the answer to every request.
    """
    parent_pid = os.getpid()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        handler = make_handler()
    except UserError as error:
        error_answer = {"error": error.message, "hint": error.hint}

        def handler(request: Any) -> dict[str, Any]:
            return error_answer

    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        answer = handler(json.loads(line))
        if os.getpid() != parent_pid:  # user code forked, and this is the child
            os._exit(0)
        out.write(json.dumps(answer, default=lambda value: {"not JSON": repr(value)[:100]}).encode() + b"\n")
        out.flush()


def as_number(value: Any) -> Any:
    """Return the value as a float, or a truncated ``repr`` if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return repr(value)[:100]


def describe_error(error: Exception) -> str:
    """Return the type and message of an exception raised by user code, truncated and with secrets redacted."""
    return redact(f"{type(error).__name__}: {str(error)[:_MAX_TEXT_LENGTH]}")
