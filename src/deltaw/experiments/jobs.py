"""What an experiment lets workers do: one request after another here, or several at once elsewhere.

An experiment knows what is to be done next and what an answer means; who does it, and where, is told apart
from it (:mod:`deltaw.experiments.cluster` is the other way). So both ways lead through the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deltaw.errors import UserError
from deltaw.experiments.child import WorkerEnded


@dataclass(frozen=True)
class Job:
    """One request to a worker.

    Attributes:
        key: tells it from the other jobs of its experiment. do, request: of
            :meth:`deltaw.experiments.child.Child.ask`. log: file to which the worker's output is appended.
    """

    key: str
    do: str
    log: Path
    request: Mapping[str, object] = field(default_factory=dict)


class Jobs(Protocol):
    """What is to be done, and what becomes of it. Never called from two threads at once."""

    def next(self) -> Job | None:
        """The next job; None where there is none beside those that are under way."""
        ...

    def report(self, key: str, report: Mapping[str, object]) -> bool:
        """An intermediate result; whether the job is to go on."""
        ...

    def ended(self, key: str, found: Mapping[str, object] | UserError | WorkerEnded) -> None:
        """A job's answer, or why there is none.

        Raises:
            UserError: the experiment is to end.
        """
        ...


class Asked(Protocol):
    """A worker: :class:`deltaw.experiments.child.Child`."""

    def ask(
        self, do: str, on_report: Callable[[Mapping[str, object]], bool] | None = None, **request: object
    ) -> dict[str, object]: ...


def here(jobs: Jobs, worker: Asked) -> None:
    """Do all jobs with one worker on this machine, one after another.

    Raises:
        UserError: the experiment ends with it.
    """
    while (job := jobs.next()) is not None:
        found: Mapping[str, object] | UserError | WorkerEnded
        key = job.key
        try:
            found = worker.ask(job.do, lambda report, key=key: jobs.report(key, report), **job.request)  # type: ignore[misc]
        except (UserError, WorkerEnded) as error:
            found = error
        jobs.ended(job.key, found)
