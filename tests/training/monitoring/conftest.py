"""Fixtures that replace the best-score criterion and the clock of runs."""

from __future__ import annotations

import itertools

import pytest

from deltaw.training.monitoring import best as best_score


@pytest.fixture
def worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the highest loss as the best, so that the best step of a run that learns is an early one."""
    monkeypatch.setattr(best_score, "deciding_metric", lambda evaluation, generates_text: ("loss", True))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock by a quarter of a second per reading. A step reads it several times."""
    readings = itertools.count()
    for module in ("runs.training_run", "training.monitoring.monitor"):
        monkeypatch.setattr(f"deltaw.{module}.now", lambda: 0.25 * next(readings))
