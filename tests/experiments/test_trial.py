"""A training that is repeated: alike each time, and never on held-out rows."""

from __future__ import annotations

import math

import pytest

from deltaw.errors import UserError
from deltaw.experiments.worker import Stopped, split_off


@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("random", "prompt"))])
def test_the_same_rate_gives_the_same_loss_whatever_was_tried_between(try_out, method):
    trial = try_out(method=method, lora={"dropout": 0.2})
    first = trial.loss(1e-2, 3)
    assert trial.loss(3e-2, 3) != first
    assert trial.loss(1e-2, 3) == first


def test_after_a_divergence_everything_is_as_before(try_out, monkeypatch):
    trial = try_out(method="bias")
    first = trial.loss(1e-3, 2)
    train = trial.session.train

    def breaks(**given):
        train(**given)
        raise UserError("training diverged")

    monkeypatch.setattr(trial.session, "train", breaks)
    assert trial.loss(1.0, 2) == math.inf
    assert trial.loss(1e-3, 2) == first


def test_a_training_is_given_up_where_asked(try_out):
    trial = try_out()
    evaluations = []

    def calibrate(number, loss):
        evaluations.append((number, loss))
        return number < 2

    with pytest.raises(Stopped):
        trial.loss(1e-2, 8, every=2, on_evaluation=calibrate)
    assert [number for number, _ in evaluations] == [1, 2]
    assert all(math.isfinite(loss) for _, loss in evaluations)


def test_held_out_rows_take_no_part_and_steps_are_a_share_of_the_runs(try_out):
    trial = try_out()  # 22 rows in batches of 8, twice
    training, validation, *whole = (
        {id(e) for e in rows}
        for rows in (trial.training, trial.validation, trial.session.data.train, trial.session.data.held_out)
    )
    assert training | validation == whole[0] and not whole[0] & whole[1] and not training & validation
    assert [trial.steps(share) for share in (0.001, 0.3, 1.0)] == [1, 2, 6]


def test_rows_are_drawn_by_the_seed():
    for count, wanted in [(2, 1), (22, 2), (1000, 100), (9000, 256)]:
        training, validation = split_off(range(count), seed=3)
        assert len(validation) == wanted and sorted([*training, *validation]) == list(range(count))
    rows = list(range(50))
    assert split_off(rows, 1) == split_off(rows, 1) != split_off(rows, 2)
    with pytest.raises(UserError, match="none to validate"):
        split_off([1], 0)
