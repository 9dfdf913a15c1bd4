"""Child processes that run one command: start, run to completion, kill.

Every child has a session of its own, so that only this process receives Ctrl-C. :mod:`deltaw.worker_process` uses
these functions for children that answer requests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from deltaw import platforms

# Maximum number of bytes that are read of each stream of a command.
MAX_OUTPUT_BYTES = 1 << 24


@dataclass(frozen=True)
class CommandResult:
    """Result of a command.

    Attributes:
        status: Exit status, negative for a signal, or None if the command exceeded its time limit.
        output: Start of the standard output.
        messages: End of the standard error.
    """

    status: int | None
    output: str = ""
    messages: str = ""


def start_command(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    **popen_options: Any,
) -> subprocess.Popen[Any]:
    """Start a command in a session of its own, without a terminal.

    Args:
        command: Program and arguments.
        environment: Environment variables. The default is those of this process.
        folder: Working directory. The default is that of this process.
        popen_options: Further options of :class:`subprocess.Popen`, for example its streams. The default standard input
            is empty. Other descriptors are inherited only if ``pass_fds`` lists them.
    """
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        start_new_session=not platforms.WINDOWS,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        **{"stdin": subprocess.DEVNULL, **popen_options},
    )


@dataclass(frozen=True)
class RunningCommand:
    """Running command.

    Attributes:
        process: Process of the command.
        output: File with its standard output.
        messages: File with its standard error.
    """

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    messages: IO[bytes]

    def finish(
        self, stdin_bytes: bytes = b"", *, timeout: float | None = None, max_bytes: int = MAX_OUTPUT_BYTES
    ) -> CommandResult:
        """Wait for the command, then kill the processes that it left behind. See :func:`run_command`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(stdin_bytes, timeout)
        status = self.process.returncode
        if status is None:
            kill_process_tree(self.process)
        else:
            _kill_group(self.process.pid)
        self.output.seek(0)
        self.messages.seek(max(0, self.messages.seek(0, os.SEEK_END) - max_bytes))
        texts = (file.read(max_bytes).decode("utf-8", "replace") for file in (self.output, self.messages))
        return CommandResult(status, *texts)


@contextlib.contextmanager
def start_job(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None
) -> Iterator[RunningCommand]:
    """Start a command that writes to temporary files. It is killed at the end of the context.

    Args:
        command: Program and arguments.
        environment: See :func:`start_command`.
        folder: See :func:`start_command`.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as messages:
        process = start_command(
            command, environment=environment, folder=folder, stdin=subprocess.PIPE, stdout=output, stderr=messages
        )
        with process:
            try:
                yield RunningCommand(process, output, messages)
            finally:
                kill_process_tree(process)


def run_command(
    command: Sequence[str],
    *,
    stdin_bytes: bytes = b"",
    timeout: float | None = None,
    max_bytes: int = MAX_OUTPUT_BYTES,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> CommandResult:
    """Run a command, then kill the processes that it left behind.

    Args:
        command: Program and arguments.
        stdin_bytes: Standard input.
        timeout: Time limit in seconds. A slower command is killed.
        max_bytes: Maximum length of the output and of the messages.
        environment: See :func:`start_command`.
        folder: See :func:`start_command`.
    """
    with start_job(command, environment=environment, folder=folder) as job:
        return job.finish(stdin_bytes, timeout=timeout, max_bytes=max_bytes)


def kill_process_tree(process: subprocess.Popen[Any]) -> int:
    """Kill a process and its descendants, including those in separate sessions, and return its exit status.

    Nothing is killed if its exit status was read before, because its pid may have been reused.
    """
    if process.returncode is not None:
        return int(process.returncode)
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        processes = [parent, *parent.children(recursive=True)]
    for member in processes:
        with contextlib.suppress(psutil.Error):
            member.kill()
    _kill_group(process.pid)  # also kill processes that were started after the listing
    status = process.wait()
    psutil.wait_procs(processes, timeout=5)
    return status


def _kill_group(pid: int) -> None:
    """Kill the processes that remain in the group of a process that was killed or whose exit status was just read.

    The system does not reuse the pid while the group has a process. An empty group does not exist, so that nothing is
    killed, unless the pid was reused for a new group since the exit. Call this immediately after it.
    """
    if not platforms.WINDOWS:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
