"""A copy of a run's folder while the run goes on: what a killed process would have left."""

from __future__ import annotations

import shutil
from pathlib import Path

from deltaw.training import checkpoints as files

ATTEMPTS = 20


def copied(run: Path, into: Path) -> Path:
    """Copy a folder in which a thread renames and removes checkpoints; one that changed meanwhile is copied
    again."""
    half = shutil.ignore_patterns(f"{files.PARTIAL}*", f"{files.DELETED}*")
    for attempt in range(ATTEMPTS):
        try:
            return Path(shutil.copytree(run, into, ignore=half))
        except (shutil.Error, FileNotFoundError):
            shutil.rmtree(into, ignore_errors=True)
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError
