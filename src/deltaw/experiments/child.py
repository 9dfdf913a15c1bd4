"""The parent side of an experiment: starts a worker process, sends it requests and reads its answers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from deltaw.errors import UserError
from deltaw.host.measurements import for_children, learn

SECONDS_TO_END = 10.0


class WorkerEnded(Exception):
    """The worker process ended before it answered; the message says how."""


class Child:
    """A worker process (:mod:`deltaw.experiments.worker`), started by the first request.

    The worker ends when this process ends, for any reason. Ctrl-C reaches this process alone.

    Args:
        log: file to which the worker's output is appended.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(
        self, do: str, on_report: Callable[[Mapping[str, object]], bool] | None = None, **request: object
    ) -> dict[str, object]:
        """Send a request and return the worker's answer.

        Args:
            do: name of the request; ``request`` holds its arguments.
            on_report: called with each intermediate report; returns whether the worker should continue.

        Raises:
            UserError: the worker refused the request.
            WorkerEnded: the worker process is gone; the next request starts another.
        """
        process = self._started()
        self._write({"do": do, **request})
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "report" in message:
                self._write(on_report is None or on_report(message["report"]))
            elif "error" in message:
                raise UserError(
                    message["error"]["what"], where=message["error"]["where"], hint=message["error"]["hint"]
                )
            else:
                learn(message.get("measured"))
                return dict(message["done"])
        status = self.close()
        raise WorkerEnded(self._ended(status))

    def close(self) -> int | None:
        """End the process. Returns its exit status, or None if no process was running."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has exited with a request unread
            process.stdin.close()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        return process.returncode

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "deltaw.experiments.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env={**os.environ, **for_children()},
                    text=True,
                    encoding="utf-8",
                    start_new_session=os.name == "posix",
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        return self._process

    def _write(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its output ends too, and `ask` reports how it ended
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _ended(self, status: int | None) -> str:
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            why = ": memory may have run out" if name == "SIGKILL" else ""
            return f"its process was ended by {name}{why} (see {self._log})"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = f": {lines[-1][:200]}" if lines else ""
        return f"its process ended with status {status}{last} (see {self._log})"
