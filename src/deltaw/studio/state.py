"""Folder and processes of a studio."""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.studio.jobs import JobQueue
from deltaw.studio.trial import TrialServer
from deltaw.studio.worker import Worker
from deltaw.studio.workspace import Workspace


@dataclass(frozen=True)
class Studio:
    """Folder and processes of a studio, which the pages share."""

    workspace: Workspace
    worker: Worker
    queue: JobQueue
    trial: TrialServer

    def close(self) -> None:
        """Stop the worker and the trial. Jobs continue."""
        self.trial.stop()
        self.worker.close()
        self.queue.close()
