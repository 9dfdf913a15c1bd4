"""Process that serves one run at a time, to try it in the browser."""

from __future__ import annotations

import collections
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from deltaw.child_process import kill_process_tree, start_command
from deltaw.errors import UserError
from deltaw.serving.http.settings import KEY_VARIABLE
from deltaw.studio.jobs import read_error, workspace_command
from deltaw.studio.workspace import Workspace

STOPPED = "stopped"
STARTING = "starting"
READY = "ready"
FAILED = "failed"
# Seconds without requests after which a starting job may stop the process.
IDLE_SECONDS = 60.0
# Maximum number of lines of output for the error message.
MAX_LINES = 40
_READY = re.compile(r"serving .* at (http://127\.0\.0\.1:\d+)\n")
_CODE = "from deltaw.worker_process import read_input; read_input(); from deltaw.cli import main; main()"


class TrialServer:
    """Process that serves a run.

    Args:
        workspace: Folder of the studio.

    Attributes:
        run: Folder of the run, or None.
        key: API key of the process.
        last_used: Time of the last request, in the seconds of :func:`time.monotonic`.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_LINES)
        self._url = self.key = ""
        self.run: Path | None = None
        self.last_used = 0.0

    @property
    def state(self) -> str:
        """``stopped``, ``starting``, ``ready`` or ``failed``."""
        process = self._process
        if process is None:
            return STOPPED
        if process.poll() is not None:
            return FAILED
        return READY if self._url else STARTING

    @property
    def url(self) -> str:
        """Address of the process, or '' if it does not answer."""
        return self._url if self.state == READY else ""

    @property
    def error(self) -> UserError:
        """Error of a process that failed."""
        hint = "close other programs if the memory was full, then try again"
        text = "".join(self._lines)
        return read_error(text) or UserError("the model could not be loaded", hint=hint)

    def start(self, run: Path, others: Sequence[Path] = ()) -> None:
        """Serve a run, and other runs of the same model next to it."""
        arguments = ["serve", str(run), "--port=0", "--log=off", *(f"--adapter={path.name}={path}" for path in others)]
        command, environment = workspace_command(_CODE, self._workspace, arguments)
        with self._lock:
            self._stop()
            self.key = secrets.token_urlsafe(32)
            process = start_command(
                command,
                environment={**environment, KEY_VARIABLE: self.key},
                folder=self._workspace.state,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
            )
            self._process = process
            self.run = run
            self.last_used = time.monotonic()
            self._lines = collections.deque(maxlen=MAX_LINES)
            threading.Thread(target=self._read, args=(process, self._lines), name="trial", daemon=True).start()

    def _read(self, process: subprocess.Popen[str], lines: collections.deque[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            match = _READY.fullmatch(line)
            with self._lock:
                if match and process is self._process:
                    self._url = match[1]

    def stop(self) -> None:
        """Stop the process."""
        with self._lock:
            self._stop()

    def stop_if_idle(self) -> None:
        """Stop the process if it had no requests for a minute, to free its memory for a job."""
        if time.monotonic() - self.last_used > IDLE_SECONDS:
            self.stop()

    def _stop(self) -> None:
        process = self._process
        self._process = None
        self._url = ""
        self.run = None
        if process is not None:
            kill_process_tree(process)  # no state to save
            assert process.stdin is not None
            process.stdin.close()
