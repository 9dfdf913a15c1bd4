"""Run the jobs of an experiment in worker processes, locally or on a Ray cluster.

An experiment implements :class:`Jobs`. Each job runs in a worker process (:mod:`deltaw.experiments.worker`), which is
controlled by a :class:`WorkerProcess`. Ray is imported lazily.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from deltaw.child_process import kill_process_tree, python_command, start_command
from deltaw.errors import UserError
from deltaw.experiments.entry import Message
from deltaw.machine.product_rates import child_environment, import_rates

EXIT_TIMEOUT = 10.0


class WorkerExited(Exception):
    """Raised if the worker process exited before it answered, with the reason."""


class WorkerProcess(contextlib.AbstractContextManager["WorkerProcess"]):
    """Handle to a worker process (:mod:`deltaw.experiments.worker`), which is started by the first request.

    The worker exits when this process exits for any reason. Only this process receives Ctrl-C.

    Args:
        log: File to which the worker's output is appended.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, on_report: Callable[[Message], bool] | None = None, **request: object) -> dict[str, object]:
        """Send a request and return the worker's answer.

        Args:
            do: Name of the request. ``request`` contains its arguments.
            on_report: Receives each intermediate report. Returns True if the worker should continue.

        Raises:
            UserError: If the worker rejected the request.
            WorkerExited: If the worker process exited. The next request starts a new one.
        """
        process = self._started()
        self._write({"do": do, **request})
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "report" in message:
                self._write(on_report is None or on_report(message["report"]))
            elif "error" in message:
                raise UserError(**message["error"])
            else:
                import_rates(message.get("measured"))
                return dict(message["done"])
        raise WorkerExited(self._exit_reason(self.close()))

    def close(self) -> int | None:
        """Stop the process and return its exit status, or None if it was not running."""
        process = self._process
        self._process = None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):  # the worker has exited with a request unread
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EXIT_TIMEOUT)
        process.stdout.close()
        return kill_process_tree(process)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                self._process = start_command(
                    python_command("from deltaw.experiments.worker import main; main()"),
                    environment={**os.environ, **child_environment()},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    encoding="utf-8",
                )
        return self._process

    def _write(self, message: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # `ask` reports the exit of the process
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _exit_reason(self, status: int | None) -> str:
        if status is not None and status < 0:
            name = signal.Signals(-status).name
            cause = ": memory may have run out" if name == "SIGKILL" else ""
            return f"its process was killed by {name}{cause} (see {self._log})"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last_line = f": {lines[-1][:200]}" if lines else ""
        return f"its process exited with status {status}{last_line} (see {self._log})"


# Answer of a job, or its error.
JobResult: TypeAlias = Message | UserError | WorkerExited


@dataclass(frozen=True)
class Job:
    """Request to a worker.

    Attributes:
        key: Unique key of the job in its experiment.
        do: Name of the request (:meth:`WorkerProcess.ask`).
        log: Log file of a separate worker.
        request: Arguments of the request.
        separate_process: The job needs a separate worker even if jobs can share one.
    """

    key: str
    do: str
    log: Path
    request: Message = field(default_factory=dict)
    separate_process: bool = False


class Jobs(Protocol):
    """Source and receiver of jobs. Never called from two threads at once."""

    def next(self) -> Job | None:
        """Return the next job, or None if all remaining jobs are running."""

    def report(self, key: str, report: Message) -> bool:
        """Receive an intermediate result. Returns True to continue the job."""

    def complete(self, key: str, result: JobResult) -> None:
        """Receive a job's answer or error.

        Raises:
            UserError: To stop the experiment.
        """


def run_locally(jobs: Jobs, worker: WorkerProcess) -> None:
    """Run all jobs on this machine, one after another, in ``worker`` or in a separate worker.

    Raises:
        UserError: If the experiment stops with an error.
    """
    while (job := jobs.next()) is not None:
        key = job.key
        if job.separate_process:
            worker.close()
        with WorkerProcess(job.log) if job.separate_process else contextlib.nullcontext(worker) as process:
            try:
                result: JobResult = process.ask(job.do, lambda report, key=key: jobs.report(key, report), **job.request)  # type: ignore[misc]
            except (UserError, WorkerExited) as error:
                result = error
        jobs.complete(key, result)
