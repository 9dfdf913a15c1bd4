"""A training that is repeated: alike each time, and never on held-out rows."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from deltaw.config import RunConfig
from deltaw.errors import UserError
from deltaw.experiments.trial import Rehearsal, Stopped, split_off


@pytest.fixture
def rehearse(study_settings, tmp_path):
    made = []

    def make(**changes):
        made.append(Rehearsal(RunConfig.read(study_settings(tmp_path, **changes)), Console(quiet=True)))
        return made[-1]

    yield make
    for rehearsal in made:
        rehearsal.close()


@pytest.mark.parametrize("method", ["lora", "head", "random", "prompt"])
def test_the_same_rate_gives_the_same_loss_whatever_was_tried_between(rehearse, method):
    rehearsal = rehearse(method=method, lora={"dropout": 0.2})
    first = rehearsal.loss(1e-2, 3)
    assert rehearsal.loss(3e-2, 3) != first
    assert rehearsal.loss(1e-2, 3) == first


def test_after_a_divergence_everything_is_as_before(rehearse, monkeypatch):
    rehearsal = rehearse(method="bias")
    first = rehearsal.loss(1e-3, 2)
    train = rehearsal.session.train

    def breaks(**given):
        train(**given)
        raise UserError("training diverged")

    monkeypatch.setattr(rehearsal.session, "train", breaks)
    assert rehearsal.loss(1.0, 2) == math.inf
    assert rehearsal.loss(1e-3, 2) == first


def test_a_training_is_given_up_where_asked(rehearse):
    rehearsal = rehearse()
    looks = []

    def look(number, loss):
        looks.append((number, loss))
        return number < 2

    with pytest.raises(Stopped):
        rehearsal.loss(1e-2, 8, every=2, on_evaluation=look)
    assert [number for number, _ in looks] == [1, 2]
    assert all(math.isfinite(loss) for _, loss in looks)


def test_held_out_rows_take_no_part(rehearse):
    rehearsal = rehearse()
    session = rehearsal.session
    rows = {id(e) for e in [*rehearsal.training, *rehearsal.validation]}
    assert rows == {id(e) for e in session.data.train}
    assert not rows & {id(e) for e in session.data.held_out}
    assert not {id(e) for e in rehearsal.training} & {id(e) for e in rehearsal.validation}


def test_rows_are_drawn_by_the_seed():
    for count, wanted in [(2, 1), (22, 2), (1000, 100), (9000, 256)]:
        training, validation = split_off(range(count), seed=3)
        assert len(validation) == wanted and sorted([*training, *validation]) == list(range(count))
    assert split_off(range(50), 1) == split_off(range(50), 1) != split_off(range(50), 2)
    with pytest.raises(UserError, match="none to judge"):
        split_off([1], 0)


def test_steps_are_a_share_of_the_runs(rehearse):
    rehearsal = rehearse()  # 22 rows in batches of 8, twice
    assert [rehearsal.steps(share) for share in (0.001, 0.3, 1.0)] == [1, 2, 6]
