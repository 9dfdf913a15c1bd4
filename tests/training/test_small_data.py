"""What is said of few rows and few steps, and the settings that suit them."""

from __future__ import annotations

import pytest

from deltaw.settings import TrainSettings
from deltaw.training.optimizer import count_steps
from deltaw.training.small_data import STEPS, held_out_line, held_out_share, steps_line, suited


@pytest.mark.parametrize("rows", [12, 48, 60, 90, 200, 999, 1000, 50_000])
def test_suited_settings_have_steps_enough(rows):
    epochs, batch_size = suited(rows)
    assert count_steps(rows, batch_size, epochs, None) >= STEPS
    assert steps_line(rows, TrainSettings(epochs=epochs, batch_size=batch_size)) is None


def test_few_rows_mean_smaller_steps_before_more_epochs():
    assert [suited(rows) for rows in (1, 12, 48, 90, 200, 2000)] == [(10, 4), (10, 4), (3, 4), (3, 8), (3, 16), (1, 16)]
    shares = {9: None, 10: 0.2, 60: 0.2, 400: 0.13, 1000: 0.05, 10**6: 0.05}
    assert {rows: held_out_share(rows) for rows in shares} == shares


def test_few_held_out_rows_are_said_with_what_they_leave_open():
    assert held_out_line(12) == "12 held-out rows are few: a score such as accuracy is known to ± 25 points"
    assert held_out_line(1).startswith("1 held-out row is few")
    assert held_out_line(0) is held_out_line(50) is None


def test_few_steps_are_said_with_what_gives_more_unless_they_were_asked_for():
    said = steps_line(48, TrainSettings())
    assert said == "3 steps are few to learn from; train.epochs: 3 and train.batch_size: 4 give 36"
    assert steps_line(48, TrainSettings(batch_size=4)) == "12 steps are few to learn from; train.epochs: 3 gives 36"
    assert steps_line(48, TrainSettings(max_steps=2)) is steps_line(48, TrainSettings(time="1m")) is None
