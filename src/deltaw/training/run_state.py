"""Whether a run's folder is in use, and how far the run in it came.

Both are in the run's ``checkpoints`` folder: a lock that the system releases when its process ends, however
it ends, and a small file with the run's settings. Knows no checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deltaw.durable import write_text
from deltaw.errors import UserError

FOLDER, STATUS, LOCK = "checkpoints", "status.json", ".lock"
VERSION = 1
# What a run may be: being trained (or killed while it was), stopped by a signal or a callback, ended by an
# error that lies outside of it, diverged, or done.
STATES = ("running", "interrupted", "failed", "diverged", "finished")


@dataclass(frozen=True)
class Status:
    """How far a run came.

    Attributes:
        state: of :data:`STATES`. steps: done when this was written.
        total_steps: of the run. settings: as :func:`deltaw.training.resuming.dumped`.
        features: of :class:`deltaw.training.features.record.FeatureRecord` before the first step.
        finished: ``steps`` at which the run was done once, ``lines`` of its metrics then, and what
            :meth:`deltaw.training.checkpoints.Checkpoints.beside` gave; None where it never was.
        process: the id of the process that wrote this.
    """

    state: str
    steps: int
    total_steps: int
    settings: Mapping[str, Any]
    features: Mapping[str, Any] = field(default_factory=dict)
    finished: Mapping[str, Any] | None = None
    process: int = field(default_factory=os.getpid)

    def write(self, run: Path) -> None:
        """Write it into a run's folder.

        Raises:
            UserError, OSError: it cannot be written.
        """
        text = json.dumps({"version": VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_text(run / FOLDER / STATUS, text + "\n")


def read_status(run: Path) -> Status | None:
    """How far the run in a folder came; None where no run is there, or none that says so."""
    try:
        values = json.loads((run / FOLDER / STATUS).read_text(encoding="utf-8"))
        if values.pop("version") != VERSION:
            return None
        status = Status(**values)
        fits = status.state in STATES and isinstance(status.settings, dict)
        whole = fits and type(status.steps) is int and type(status.process) is int
        return status if whole else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


class RunLock:
    """A run's folder, taken by this process until it is released or the process ends.

    Raises:
        UserError: another process has it, or the folder cannot be written.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(run / FOLDER / LOCK, timeout=0, thread_local=False)
            self._lock.acquire()
        except Timeout as error:
            raise self._in_use() from error
        except OSError as error:
            raise UserError(
                f"cannot write into the output folder: {error.strerror or error}",
                where=str(run),
                hint="set 'output' to a folder that you may write to",
            ) from error

    def release(self) -> None:
        """Let others have the folder."""
        self._lock.release()

    def _in_use(self) -> UserError:
        status = read_status(self._run)
        who = "another process" if status is None else f"process {status.process}"
        return UserError(
            f"{who} is training into this folder",
            where=str(self._run),
            hint="wait until it is done, stop it, or set 'output' to another folder",
        )
