"""Which runs somebody means: a folder of runs, the path of a run, or its name in the folder ``runs``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import UserError, did_you_mean
from deltaw.reports.recorded import RecordedRun, find_runs, is_run, read_run

# Where runs are by default.
FOLDER = "runs"


@dataclass(frozen=True)
class Chosen:
    """Runs, and whether they are to be compared rather than listed. where: the folder, for a message."""

    records: list[RecordedRun]
    compared: bool
    where: str


def choose_runs(names: Sequence[str]) -> Chosen:
    """The runs that ``names`` means.

    Nothing: all below ``runs``. Folders of runs are listed; two or more runs are compared.

    Raises:
        UserError: a name is neither a run nor a folder.
    """
    if not names:
        folder = Path(FOLDER)
        if not folder.exists():
            return Chosen([], False, FOLDER)
        return Chosen([read_run(path) for path in find_runs(folder)], False, FOLDER)
    found: list[Path] = []
    listed = False
    for name in names:
        path = _place(name)
        if is_run(path):
            found.append(path)
        else:
            listed = True
            found += find_runs(path)
    distinct = list({path.resolve(): path for path in found}.values())
    return Chosen([read_run(path) for path in distinct], not listed and len(distinct) > 1, ", ".join(names))


def _place(name: str) -> Path:
    """The folder that a name means."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    below = Path(FOLDER) / name
    if below.is_dir():
        return below
    there = Path(FOLDER)
    known = [os.path.relpath(run, there) for run in find_runs(there)] if there.is_dir() else []
    raise UserError(
        f"'{name}' is neither a run nor a folder of runs",
        where="the runs to list",
        hint=did_you_mean(name, known) if known else "give the path of a run's folder",
    )
