"""Child processes that run one command: start, run to completion, kill.

Every child has a session of its own, so that only this process receives Ctrl-C. :mod:`deltaw.worker_process` uses
these functions for children that answer requests.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None, **streams: Any
) -> subprocess.Popen[Any]:
    """Start a command in a session of its own. It inherits no descriptors.

    Args:
        command: Program and arguments.
        environment: Environment variables. The default is those of this process.
        folder: Working directory. The default is that of this process.
        streams: Options of :class:`subprocess.Popen` for the streams. The default standard input is empty.
    """
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        start_new_session=not platforms.WINDOWS,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        **{"stdin": subprocess.DEVNULL, **streams},
    )


def run_command(
    command: Sequence[str],
    *,
    content: bytes = b"",
    seconds: float | None = None,
    max_bytes: int = MAX_OUTPUT_BYTES,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> CommandResult:
    """Run a command, then kill the processes that it left behind.

    Args:
        command: Program and arguments.
        content: Standard input.
        seconds: Time limit. A slower command is killed.
        max_bytes: Maximum length of the output and of the messages.
        environment: See :func:`start_command`.
        folder: See :func:`start_command`.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as messages:
        process = start_command(
            command, environment=environment, folder=folder, stdin=subprocess.PIPE, stdout=output, stderr=messages
        )
        with process:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(content, seconds)
                status = process.returncode
            finally:
                kill_process_tree(process)
        output.seek(0)
        messages.seek(max(0, messages.seek(0, os.SEEK_END) - max_bytes))
        texts = (file.read(max_bytes).decode("utf-8", "replace") for file in (output, messages))
        return CommandResult(status, *texts)


def kill_tree(pid: int) -> list[psutil.Process]:
    """Kill a process and its descendants, including those in separate sessions, and return them."""
    processes: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if not platforms.WINDOWS:
        with contextlib.suppress(OSError):  # also kill processes that were started after the listing
            os.killpg(pid, 9)
    return processes


def kill_process_tree(process: subprocess.Popen[Any]) -> int:
    """Kill a process and its descendants, and return its exit status."""
    processes = kill_tree(process.pid)
    status = process.wait()
    psutil.wait_procs(processes, timeout=5)
    return status
