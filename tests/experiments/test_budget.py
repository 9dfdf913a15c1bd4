"""What one training may take at most."""

from __future__ import annotations

import pytest

from deltaw.errors import UserError
from deltaw.experiments.budget import Budget, budget_of, seconds_of
from deltaw.train_settings import TrainSettings


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400), ("2 h", 7200)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "ten minutes", "0m", "-5m", "5m later"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UserError, match="is not a time"):
        seconds_of(text)


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
