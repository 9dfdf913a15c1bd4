"""Worker processes that answer requests over pipes and can be killed at any time.

:class:`PipeWorker` starts a worker and sends requests. The worker calls :func:`serve`. Requests and answers are
frames: the length in eight bytes, then the content.
"""

from __future__ import annotations

import os
import queue
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any, TypeVar

from deltaw import platforms
from deltaw.child_process import kill_process_tree, start_command

_HEADER_BYTES = 8
# Maximum length of all answers of a request.
_MAX_TOTAL_BYTES = 1 << 28
_READ_BYTES = 1 << 20  # maximum number of bytes per system call
# Maximum time for which answers of a request are buffered.
_FLUSH_SECONDS = 0.05
# Default time limit for the start of a worker, long enough for a busy machine.
_START_SECONDS = 60.0

A = TypeVar("A")
T = TypeVar("T")


class WorkerError(Exception):
    """A worker gave no valid answer and was killed. The message is a verb phrase, such as "gave no answer"."""


class PipeWorker:
    """A worker process. It starts at the first request.

    Args:
        command: Program and arguments.
        environment: Environment variables. The default is those of this process.
        extra_start_seconds: Time allowed for the start, in addition to the default.
        restart: Start it again at the first request after it was killed. Otherwise, this request is a WorkerError.
        options: Further options of :func:`deltaw.child_process.start_command`.

    Attributes:
        lock: Held during a request. It is reentrant.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        extra_start_seconds: float = 0.0,
        restart: bool = True,
        **options: Any,
    ) -> None:
        self._command = command
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self._options = {"environment": environment, **pipes, **options}
        self._start_seconds = _START_SECONDS + extra_start_seconds
        self._can_start = True
        self._restart = restart
        self._process: subprocess.Popen[bytes] | None = None
        self._can_poll = True
        self._deadline = 0.0
        self._buffer = bytearray()  # received bytes
        self.lock = threading.RLock()

    @property
    def is_running(self) -> bool:
        """True if the worker was started and has not exited."""
        return self._process is not None and self._process.poll() is None

    def request(self, request: bytes, seconds: float, *, max_bytes: int, count: int = 1) -> list[bytes]:
        """Send a request and return the worker's answers.

        Args:
            seconds: Time limit of each answer.
            max_bytes: Maximum length of an answer.
            count: Number of answers. With 0, only send the request.

        Raises:
            WorkerError: if an answer is missing, late or too long.
        """
        with self.lock:
            try:
                process = self._process or self._start()
                self._deadline = time.monotonic() + seconds
                self._write(process, len(request).to_bytes(_HEADER_BYTES, "little") + request)
                answers, total = [], 0
                for _ in range(count):
                    answers.append(self._read_frame(process, seconds, max_bytes))
                    total += len(answers[-1])
                    if total > max(max_bytes, _MAX_TOTAL_BYTES):
                        raise WorkerError(f"gave answers longer than {_MAX_TOTAL_BYTES >> 20} MiB in all")
                return answers
            except (OSError, EOFError) as error:
                self.close()
                raise WorkerError(f"gave no answer within {seconds:g} seconds, or its process exited") from error
            except BaseException:
                self.close()  # after an interrupt, the pipe may contain the rest of an answer
                raise

    def close(self) -> None:
        """Kill the worker."""
        process, self._process = self._process, None
        if process is not None:
            kill_process_tree(process)

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a worker and wait until it is ready."""
        if not self._can_start:
            raise WorkerError("was killed, and cannot be started again")
        self._can_start = self._restart
        process = start_command(self._command, **self._options)
        self._process, self._can_poll = process, not platforms.WINDOWS
        for pipe in (process.stdin, process.stdout):
            if self._can_poll and pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        self._buffer.clear()
        self._read_frame(process, self._start_seconds, 0)
        return process

    def _write(self, process: subprocess.Popen[bytes], data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._before_deadline(process, process.stdin, os.write, left) :]

    def _read_frame(self, process: subprocess.Popen[bytes], seconds: float, max_bytes: int) -> bytes:
        self._deadline = time.monotonic() + seconds
        size = int.from_bytes(self._read(process, _HEADER_BYTES), "little")
        if size > max_bytes and not max_bytes:
            raise WorkerError("wrote unexpected output while starting")
        if size > max_bytes:
            raise WorkerError(f"gave an answer longer than {max_bytes >> 20} MiB")
        return self._read(process, size)

    def _read(self, process: subprocess.Popen[bytes], size: int) -> bytes:
        while len(self._buffer) < size:
            part = self._before_deadline(process, process.stdout, os.read, _READ_BYTES)
            if not part:
                raise EOFError
            self._buffer += part
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        return content

    def _before_deadline(
        self, process: subprocess.Popen[bytes], pipe: Any, operation: Callable[[int, A], T], argument: A
    ) -> T:
        """Call ``os.read`` or ``os.write``. Pipes of Windows have no timeout, so a timer kills the worker."""
        left = max(self._deadline - time.monotonic(), 0)
        if not self._can_poll:
            timer = threading.Timer(left, kill_process_tree, [process])
            timer.start()
            try:
                return operation(pipe.fileno(), argument)
            finally:
                timer.cancel()
        poll = select.poll()
        poll.register(pipe, select.POLLIN if pipe is process.stdout else select.POLLOUT)
        if not poll.poll(left * 1000):
            raise TimeoutError
        return operation(pipe.fileno(), argument)


def read_input(receive: Callable[[bytes], object] = len) -> None:
    """Read standard input in a thread, and exit the process at its end.

    The input ends when the parent process closes it or exits for any reason, so that no child outlives its parent.
    Native code that holds the interpreter's lock delays the exit.

    Args:
        receive: Receives each chunk. The default ignores it.
    """

    def read() -> None:
        # Read the file descriptor directly: the lock of sys.stdin would block the shutdown of the interpreter.
        while chunk := os.read(0, _READ_BYTES):
            receive(chunk)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()


def serve(make_handler: Callable[[], Callable[[bytes], Iterable[bytes]]]) -> None:
    """Answer requests from standard input. Standard output is redirected to standard error.

    The process exits when standard input is closed, even during a request (:func:`read_input`).

    Args:
        make_handler: Returns a function that yields the answers to a request.
    """
    own_pid = os.getpid()
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    buffer = bytearray()

    def receive(chunk: bytes) -> None:
        buffer.extend(chunk)
        while len(buffer) >= _HEADER_BYTES:
            end = _HEADER_BYTES + int.from_bytes(buffer[:_HEADER_BYTES], "little")
            if len(buffer) < end:
                return
            requests.put(bytes(buffer[_HEADER_BYTES:end]))
            del buffer[:end]

    read_input(receive)
    out = os.fdopen(os.dup(1), "wb", _READ_BYTES)
    os.dup2(2, 1)
    handler = make_handler()
    _write_frame(out, b"")
    out.flush()
    while True:
        request = requests.get()
        flushed = time.monotonic()
        for answer in handler(request):
            if os.getpid() != own_pid:  # user code forked, and this is the child
                os._exit(0)
            _write_frame(out, answer)
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                out.flush()
                flushed = time.monotonic()
        out.flush()


def _write_frame(out: IO[bytes], content: bytes) -> None:
    out.write(len(content).to_bytes(_HEADER_BYTES, "little") + content)
