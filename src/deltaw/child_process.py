"""Child processes that run one command: start, run to completion, kill.

Every child has a session of its own, so that only this process receives Ctrl-C. :mod:`deltaw.worker_process` uses
these functions for children that answer requests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from deltaw import platforms

# Maximum number of bytes of each stream of a command.
MAX_OUTPUT_BYTES = 1 << 24
_SECONDS_BETWEEN_CHECKS = 0.05
# Variables that a Python interpreter may need.
_MINIMAL_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


@dataclass(frozen=True)
class CommandResult:
    """Result of a command.

    Attributes:
        status: Exit status, negative for a signal, or None if the command exceeded its time limit or wrote too much.
        output: Start of the standard output.
        messages: End of the standard error.
    """

    status: int | None
    output: str = ""
    messages: str = ""


def python_command(
    code: str, arguments: Sequence[str] = (), *, options: Sequence[str] = (), include_current_folder: bool = True
) -> list[str]:
    """Return the command that runs Python code with the module search path of this process.

    ``python -m`` and ``python -c`` search the current folder first, which may contain downloaded files. The command
    searches it only if this process does.

    Args:
        code: Statements. The module ``sys`` is imported.
        arguments: Command-line arguments, without the name of the program.
        options: Options of the interpreter.
        include_current_folder: False to never search the current folder, unless deltaw itself is imported from it.
    """
    # Names of import hooks are not paths. '' is the current folder.
    paths = [os.path.abspath(path) if os.path.exists(path or os.curdir) else path for path in sys.path]
    if not include_current_folder:
        excluded = {os.getcwd()} - {str(Path(__file__).parents[1])}
        paths = [path for path in paths if path not in excluded]
    return [sys.executable, *options, "-c", f"import sys; sys.path[:] = {paths!r}; {code}", *arguments]


def minimal_environment() -> dict[str, str]:
    """Return the environment for processes that parse untrusted files. It has no secrets, such as access tokens."""
    return {name: os.environ[name] for name in _MINIMAL_VARIABLES if name in os.environ}


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
        self, stdin_bytes: bytes | None = b"", *, timeout: float | None = None, max_bytes: int = MAX_OUTPUT_BYTES
    ) -> CommandResult:
        """Wait for the command, then kill the processes that it left behind. See :func:`run_command`."""
        finished = threading.Event()
        watcher = threading.Thread(target=self._limit_size, args=(max_bytes, finished), daemon=True)
        watcher.start()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if stdin_bytes is None:
                    self.process.wait(timeout)
                else:
                    self.process.communicate(stdin_bytes, timeout)
            status = self.process.returncode
            if status is None:
                kill_process_tree(self.process)
            else:
                _kill_group(self.process.pid)
        finally:
            finished.set()
            watcher.join()
        if self._written_bytes() > max_bytes:
            status = None
        self.output.seek(0)
        self.messages.seek(max(0, self.messages.seek(0, os.SEEK_END) - max_bytes))
        texts = (file.read(max_bytes).decode("utf-8", "replace") for file in (self.output, self.messages))
        return CommandResult(status, *texts)

    def _written_bytes(self) -> int:
        return max(os.fstat(file.fileno()).st_size for file in (self.output, self.messages))

    def _limit_size(self, max_bytes: int, finished: threading.Event) -> None:
        """Kill the command if it writes too much."""
        while not finished.wait(_SECONDS_BETWEEN_CHECKS):
            if self._written_bytes() > max_bytes:
                kill_process_tree(self.process)
                return


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
    stdin_bytes: bytes | None = b"",
    timeout: float | None = None,
    max_bytes: int = MAX_OUTPUT_BYTES,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> CommandResult:
    """Run a command, then kill the processes that it left behind in its session.

    Processes that it moved to other sessions are killed only if it exceeds a limit and they are still its descendants.

    Args:
        command: Program and arguments.
        stdin_bytes: Standard input, or None to keep it open and empty until the command exits
            (:func:`deltaw.worker_process.read_input`).
        timeout: Time limit in seconds. A slower command is killed.
        max_bytes: Maximum length of the output, and of the messages. A command that writes more is killed.
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
