"""Scores and a clock that runs are made to believe in."""

from __future__ import annotations

import itertools

import pytest

from deltaw.training.monitoring import best as best_score


@pytest.fixture
def worst(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest loss counts as the best, so that the best step of a run that learns is an early one."""
    monkeypatch.setattr(best_score, "deciding_metric", lambda evaluation, writes_text: ("loss", True))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look takes time, and a step has a few of them."""
    looks = itertools.count()
    for module in ("runs.fit", "training.monitoring.monitor"):
        monkeypatch.setattr(f"deltaw.{module}.now", lambda: 0.25 * next(looks))
