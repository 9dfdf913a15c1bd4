"""Limits of a training in a study."""

from __future__ import annotations

from deltaw.experiments.folder import Budget, budget_from_settings
from deltaw.settings.config import TrainSettings


def test_steps_follow_epochs_without_time_limit():
    settings = TrainSettings(epochs=3, batch_size=8)
    assert budget_from_settings(settings, 20) == Budget(steps=9)
    assert budget_from_settings(settings.model_copy(update={"max_steps": 4}), 20) == Budget(steps=4)
    timed = settings.model_copy(update={"time": "2m"})
    assert budget_from_settings(timed, 20) == Budget(seconds=120.0)
    assert budget_from_settings(timed.model_copy(update={"max_steps": 4}), 20) == Budget(4, 120.0)


def test_share_of_budget_has_at_least_one_step():
    assert Budget(100, 60.0).times(0.3) == Budget(30, 18.0)
    assert Budget(1).times(0.3) == Budget(1)
