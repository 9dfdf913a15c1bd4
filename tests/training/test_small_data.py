"""Warnings about small numbers of rows and steps, and the settings recommended for them."""

from __future__ import annotations

import pytest

from deltaw.settings.config import TrainSettings
from deltaw.training.optimizer import count_steps
from deltaw.training.small_data import (
    MIN_STEPS,
    eval_share,
    eval_size_warning,
    recommended_settings,
    step_count_warning,
)


@pytest.mark.parametrize("rows", [12, 48, 60, 90, 200, 999, 1000, 50_000])
def test_recommended_settings_give_enough_steps(rows):
    epochs, batch_size = recommended_settings(rows)
    assert count_steps(rows, batch_size, epochs, None) >= MIN_STEPS
    assert step_count_warning(rows, TrainSettings(epochs=epochs, batch_size=batch_size)) is None


def test_fewer_rows_reduce_batch_size_before_adding_epochs():
    expected = {1: (10, 4), 12: (10, 4), 48: (3, 4), 90: (3, 8), 200: (3, 16), 2000: (1, 16)}
    assert {rows: recommended_settings(rows) for rows in expected} == expected
    shares = {9: None, 10: 0.2, 60: 0.2, 400: 0.13, 1000: 0.05, 10**6: 0.05}
    assert {rows: eval_share(rows) for rows in shares} == shares


def test_small_evaluation_set_is_reported_with_its_uncertainty():
    assert eval_size_warning(12) == "12 held-out rows are few: a score such as accuracy is known to ± 25 points"
    assert eval_size_warning(1).startswith("1 held-out row is few")
    assert eval_size_warning(0) is eval_size_warning(50) is None


def test_low_step_count_is_reported_unless_requested():
    warning = step_count_warning(48, TrainSettings())
    assert warning == "3 steps are few to learn from; train.epochs: 3 and train.batch_size: 4 give 36"
    warning = step_count_warning(48, TrainSettings(batch_size=4))
    assert warning == "12 steps are few to learn from; train.epochs: 3 gives 36"
    assert step_count_warning(48, TrainSettings(max_steps=2)) is None
    assert step_count_warning(48, TrainSettings(time="1m")) is None
