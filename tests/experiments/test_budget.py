"""What one training may take at most."""

from __future__ import annotations

from deltaw.experiments.folder import Budget, budget_of
from deltaw.settings import TrainSettings


def test_steps_come_from_epochs_unless_time_is_given():
    settings = TrainSettings(epochs=3, batch_size=8)
    assert budget_of(settings, 20) == Budget(steps=9)
    assert budget_of(settings.model_copy(update={"max_steps": 4}), 20) == Budget(steps=4)
    timed = settings.model_copy(update={"time": "2m"})
    assert budget_of(timed, 20) == Budget(seconds=120.0)
    assert budget_of(timed.model_copy(update={"max_steps": 4}), 20) == Budget(4, 120.0)


def test_a_share_of_it_has_a_step_at_least():
    assert Budget(100, 60.0).times(0.3) == Budget(30, 18.0)
    assert Budget(1).times(0.3) == Budget(1)
