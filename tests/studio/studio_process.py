"""A studio as a process of the command line, for tests in a browser."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from deltaw.studio.jobs import JobQueue, interrupt
from deltaw.studio.workspace import Workspace


class StudioProcess:
    """Process of ``deltaw studio``.

    Args:
        folder: Folder of the studio.
        port: Port to listen on. 0 for a free one.

    Attributes:
        address: Address with the token that connects a browser.
        url: Address without it.
        port: Port.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "deltaw", "studio", str(folder), f"--port={port}", "--no-browser"]
        self.log = (folder.parent / "studio.log").open("ab")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " at http://" in line, (folder.parent / "studio.log").read_text()
        self.address = line.rpartition(" ")[2].strip()
        self.url = self.address.partition("?")[0]
        self.port = urlsplit(self.url).port or 0

    def kill(self) -> None:
        """Kill the process as the system does if the memory is full."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the process as Ctrl-C does."""
        self._end(signal.SIGINT)

    def _end(self, sig: int) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, sig)
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()


@contextlib.contextmanager
def studio_process(folder: Path) -> Iterator[StudioProcess]:
    """Run a studio, and kill its jobs at the end."""
    studio = StudioProcess(folder)
    try:
        yield studio
    finally:
        studio.close()
        kill_jobs(folder)


def kill_jobs(folder: Path) -> None:
    """Kill the running jobs of a studio."""
    for job in JobQueue(Workspace(folder)).jobs():
        if job.is_active:
            interrupt(job.process or {}, kill=True)
            with contextlib.suppress(psutil.Error):
                psutil.Process((job.process or {}).get("id")).wait(30)
