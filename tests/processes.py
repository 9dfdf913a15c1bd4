"""Forked processes for tests of signals, streams, crashes and multi-process training.

Importing torch and transformers takes seconds, so one server per pytest process imports them once and forks. Each
forked process has separate arguments, environment, streams and working directory. Tests of imports, or of environment
variables read at import time, start a new interpreter instead.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.child_process import CommandResult

PRELOADED = (
    "deltaw.cli.generate",
    "deltaw.cli.train",
    "deltaw.runs.fit",
    "tests.byte_models",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
)
MESSAGE_BYTES = 1 << 20


class Process:
    """A forked process with the subset of :class:`subprocess.Popen` that tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        imported: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        reading, self._input = os.pipe()
        self._status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        message = {"arguments": list(arguments), "env": dict(env), "cwd": os.fspath(cwd or os.getcwd())}
        handles = [reading, self._output.fileno(), self._errors.fileno(), status.fileno()]
        socket.send_fds(_server(imported), [json.dumps(message).encode()], handles)
        os.close(reading)
        status.close()
        self.pid = int(self._status.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(self._status.recv(64))
            except (TimeoutError, BlockingIOError) as error:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from error
        return self.returncode

    def communicate(self, text: str = "", timeout: float | None = None) -> tuple[str, str]:
        """Wait for the process, and return its output and errors."""
        with os.fdopen(self._input, "w") as stdin, contextlib.suppress(BrokenPipeError):
            stdin.write(text)
        self.wait(timeout)
        return self.current_output()

    def current_output(self) -> tuple[str, str]:
        """Return the output and errors so far, without moving the file positions."""
        output, errors = (os.pread(file.fileno(), 1 << 26, 0).decode() for file in (self._output, self._errors))
        return output, errors

    def wait_for(self, ready: Callable[[], Any], seconds: float = 120.0) -> Any:
        """Poll ``ready`` until it returns a true value, and return that value. Fails if the process exits first."""
        deadline = time.monotonic() + seconds
        while not (value := ready()):
            assert self.poll() is None and time.monotonic() < deadline, self.current_output()
            time.sleep(0.01)
        return value

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait(60)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: object,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    imported: Mapping[str, str] | None = None,
) -> Process:
    """Start ``python *arguments``, where the first argument is ``-m`` or ``-c``.

    Args:
        env: Variables added to the environment.
        imported: Variables also set before the libraries are imported.
    """
    imported = imported or {}
    environment = {**os.environ, **imported, **(env or {})}
    return Process([str(argument) for argument in arguments], environment, cwd, tuple(sorted(imported.items())))


def run_forked(command: Sequence[object], *, stdin_bytes: bytes | None = b"") -> CommandResult:
    """Run an interpreter command in a forked process, like :func:`deltaw.child_process.run_command`."""
    process = start(*command[1:])
    if stdin_bytes is None:  # the input stays open
        process.wait()
    output, errors = process.communicate()
    return CommandResult(process.wait(), output, errors)


@functools.cache
def _server(imported: tuple[tuple[str, str], ...] = ()) -> socket.socket:
    """Start a fork server whose libraries were imported with these variables, and return the connection to it.

    The server exits when the connection is closed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    size = 4 * MESSAGE_BYTES
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes", str(theirs.fileno())],
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, **dict(imported), "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
        )
    return ours


def _serve(requests: socket.socket) -> list[str] | None:
    """Fork for each request, and return the arguments in the forked process."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reap the monitoring processes automatically
    while True:
        message, handles, *_ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
        if not message:
            return None
        if not os.fork():
            requests.close()
            return _forked(json.loads(message), handles)
        for handle in handles:
            os.close(handle)


def _forked(request: dict, handles: list[int]) -> list[str]:
    """Fork the requested process, and report its pid and exit status from a monitoring process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, status = handles
    pid = os.fork()
    if pid:
        for handle in (0, 1, 2, *streams):
            os.close(handle)
        os.write(status, str(pid).encode())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):
            os.write(status, str(code).encode())
        os._exit(0)
    os.close(status)
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
        os.close(handle)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(os.fdopen(number, mode), line_buffering=True) for number, mode in enumerate(("rb", "wb", "wb"))
    )
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()
    return request["arguments"]


if __name__ == "__main__":
    request_arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request_arguments is not None:
        kind, program, *rest = request_arguments
        sys.argv = [program, *rest]
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<code>", "exec"), {"__name__": "__main__"})
