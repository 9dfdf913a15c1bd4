"""Trials are repeatable and never use held-out rows."""

from __future__ import annotations

import math

import pytest

from deltaw.errors import UserError
from deltaw.experiments.trial import TrainingStopped, split_validation


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("random", "prompt"))])
def test_equal_rate_gives_equal_loss(make_trial, method):
    trial = make_trial(method=method, lora={"dropout": 0.2})
    first = trial.loss(1e-2, 3)
    assert trial.loss(3e-2, 3) != first
    assert trial.loss(1e-2, 3) == first


def test_state_is_restored_after_divergence(make_trial, monkeypatch):
    trial = make_trial(method="bias")
    first = trial.loss(1e-3, 2)
    train = trial.session.train

    def train_then_diverge(**options):
        train(**options)
        raise UserError("training diverged")

    monkeypatch.setattr(trial.session, "train", train_then_diverge)
    assert trial.loss(1.0, 2) == math.inf
    assert trial.loss(1e-3, 2) == first


def test_trial_stops_on_request(make_trial):
    trial = make_trial()
    evaluations = []

    def calibrate(number, loss):
        evaluations.append((number, loss))
        return number < 2

    with pytest.raises(TrainingStopped):
        trial.loss(1e-2, 8, every=2, callback=calibrate)
    assert [number for number, _ in evaluations] == [1, 2]
    assert all(math.isfinite(loss) for _, loss in evaluations)


def test_trial_excludes_evaluation_rows_and_scales_steps(make_trial):
    trial = make_trial()  # 22 rows in batches of 8, twice
    training, validation, *run_rows = (
        {id(e) for e in rows}
        for rows in (trial.training, trial.validation, trial.session.data.train, trial.session.data.held_out)
    )
    assert training | validation == run_rows[0] and not run_rows[0] & run_rows[1] and not training & validation
    assert [trial.steps(share) for share in (0.001, 0.3, 1.0)] == [1, 2, 6]


def test_validation_split_depends_on_seed():
    for count, expected in [(2, 1), (22, 2), (1000, 100), (9000, 256)]:
        training, validation = split_validation(range(count), seed=3)
        assert len(validation) == expected and sorted([*training, *validation]) == list(range(count))
    rows = list(range(50))
    assert split_validation(rows, 1) == split_validation(rows, 1) != split_validation(rows, 2)
    with pytest.raises(UserError, match="too few for validation"):
        split_validation([1], 0)
