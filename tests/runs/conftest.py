"""Shared runs: a complete one and one that was stopped after three steps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deltaw.runs.fit import fit
from tests.conftest import Settings
from tests.training.conftest import _fast_runs  # noqa: F401 (an automatic fixture)
from tests.training.runs import TRAIN, stopped_run


@pytest.fixture(scope="session")
def complete_run(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an uninterrupted run of twelve steps."""
    return fit(settings(tmp_path_factory.mktemp("whole") / "run", train=TRAIN)).output


@pytest.fixture(scope="session")
def _stopped(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(settings(tmp_path_factory.mktemp("stopped") / "run", train=TRAIN), 3)


@pytest.fixture
def stopped_copy(_stopped: Path, tmp_path: Path) -> Path:
    """Return a copy in ``tmp_path / "run"`` of the same run, stopped after three steps."""
    return Path(shutil.copytree(_stopped, tmp_path / "run"))
