"""Processes for tests whose subject is a process of its own: signals, streams, death, several that train as one.

Importing torch and transformers takes seconds, so one server for each process of pytest does it once and forks.
What is forked has its own arguments, environment, streams and folder. Tests of what an interpreter imports, or of
what libraries read from the environment while they are imported, start an interpreter instead.
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

PRELOADED = (
    "deltaw.cli.generate",
    "deltaw.cli.train",
    "deltaw.runs.fit",
    "deltaw.runs.follower",
    "tests.byte_models",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
)
MESSAGE_BYTES = 1 << 20


class Process:
    """A forked process: as much of :class:`subprocess.Popen` as tests use."""

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
        given = [reading, self._output.fileno(), self._errors.fileno(), status.fileno()]
        socket.send_fds(_server(imported), [json.dumps(message).encode()], given)
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
        """Output and errors, once the process has ended."""
        with os.fdopen(self._input, "w") as stdin, contextlib.suppress(BrokenPipeError):
            stdin.write(text)
        self.wait(timeout)
        return self.said()

    def said(self) -> tuple[str, str]:
        """Output and errors up to now; where the process writes next stays as it is."""
        output, errors = (os.pread(file.fileno(), 1 << 26, 0).decode() for file in (self._output, self._errors))
        return output, errors

    def until(self, ready: Callable[[], Any], seconds: float = 120.0) -> Any:
        """What ``ready`` returns once that is true, for which the process must live."""
        ends = time.monotonic() + seconds
        while not (found := ready()):
            assert self.poll() is None and time.monotonic() < ends, self.said()
            time.sleep(0.01)
        return found

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
    """What ``python *arguments`` is, with ``-m module`` or ``-c code`` first; ``env`` is added to the environment, and
    ``imported`` also to that in which libraries are imported."""
    imported = imported or {}
    environment = {**os.environ, **imported, **(env or {})}
    return Process([str(argument) for argument in arguments], environment, cwd, tuple(sorted(imported.items())))


def run_forked(command: Sequence[object], **_: object) -> subprocess.CompletedProcess[str]:
    """What :func:`subprocess.run` is for an interpreter and its arguments."""
    process = start(*command[1:])
    output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.wait(), output, errors)


@functools.cache
def _server(imported: tuple[tuple[str, str], ...] = ()) -> socket.socket:
    """The connection to the server whose libraries were imported with these variables; it ends with the connection."""
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
    """Fork for each request; in the process that was asked for, return its arguments."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who watch are forgotten
    while True:
        message, handles, *_ = socket.recv_fds(requests, MESSAGE_BYTES, 4)
        if not message:
            return None
        if not os.fork():
            requests.close()
            return _forked(json.loads(message), handles)
        for handle in handles:
            os.close(handle)


def _forked(asked: dict, handles: list[int]) -> list[str]:
    """In a process that watches: fork the one that was asked for, and report its number and its end."""
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
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    random.seed()
    return asked["arguments"]


if __name__ == "__main__":
    found = _serve(socket.socket(fileno=int(sys.argv[1])))
    if found is not None:
        kind, what, *rest = found
        sys.argv = [what, *rest]
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<code>", "exec"), {"__name__": "__main__"})
