"""The side of a study that asks: a worker process, its answers, and what became of it."""

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

SECONDS_TO_END = 10.0


class WorkerEnded(Exception):
    """The worker process ended in the midst of its work; the message says how."""


class Child:
    """A worker process (:mod:`deltaw.experiments.worker`) of its own, started when it is first asked.

    It ends with this process, however that ends, and Ctrl-C reaches this process alone.

    Args:
        log: file that what it prints is added to.
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
        """What the worker answers.

        Args:
            do: what it is to do, with ``request``.
            on_report: told of what happens on the way; answers whether to go on.

        Raises:
            UserError: what the worker refused.
            WorkerEnded: it is no longer there; the next request starts another.
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
                return dict(message["done"])
        status = self.close()
        raise WorkerEnded(self._ended(status))

    def close(self) -> int | None:
        """End the process; its exit status, or None where there was none."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # gone already, with a request unread
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
                    text=True,
                    encoding="utf-8",
                    start_new_session=os.name == "posix",
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )
        return self._process

    def _write(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its output ends too, which tells what became of it
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
