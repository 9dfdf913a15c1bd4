"""Queue of jobs, which run one after the other as processes of the command line and survive the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.studio.workspace import Workspace


@dataclass
class Job:
    """Process of the command line.

    Attributes:
        verb: Command, such as ``train``.
        title: Description for the user.
        run: Folder of its run, relative to the studio's folder, or None.
        output: File or folder that it creates, relative to the studio's folder, or None.
        draft: Draft that it was started from, or None.
        state: ``queued``, ``running``, ``done``, ``failed`` or ``stopped``.
    """

    identity: str
    verb: str
    title: str
    arguments: list[str]
    run: str | None
    output: str | None
    draft: str | None
    created: float
    process: dict[str, Any] | None
    state: str

    @property
    def result(self) -> dict[str, Any] | None:
        """JSON object that the job printed, or None."""
        return None

    @property
    def message(self) -> str:
        """Error message, or the last lines of the job's output."""
        return ""


class JobQueue:
    """Queue of jobs.

    Args:
        workspace: Folder of the studio.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def start(self) -> None:
        """Start the thread that polls."""

    def close(self) -> None:
        """Stop the thread. Running jobs continue."""

    def add(
        self, verb: str, arguments: Sequence[str], *, title: str, run: Path | None = None,
        settings: Mapping[str, Any] | None = None, output: Path | None = None, draft: str | None = None,
    ) -> Job:  # fmt: skip
        """Add a job.

        Args:
            verb: Command, such as ``train``.
            arguments: Command line after ``deltaw``, including the verb.
            settings: Settings to write to the job's folder. The path of the file is appended to the command line.
        """
        raise UserError("jobs cannot be started yet")

    def jobs(self) -> list[Job]:
        """Return all jobs: the running one, queued ones in order, then others, the last created first."""
        return []

    def job(self, identity: str) -> Job:
        """Return a job.

        Raises:
            UserError: if it does not exist.
        """
        raise UserError("this job does not exist", hint="go to the list of trainings")

    def stop(self, identity: str) -> None:
        """Interrupt a running job, or remove a queued one."""

    def remove(self, identity: str) -> None:
        """Remove a job that is not running."""

    def first(self, identity: str) -> None:
        """Move a queued job to the front."""

    def poll(self) -> None:
        """Record jobs that ended, and start the next one."""

    def busy(self) -> Job | None:
        """Return the running job, or None."""
        return None


def child_command(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return the command line and the process options of a command of deltaw."""
    raise NotImplementedError
