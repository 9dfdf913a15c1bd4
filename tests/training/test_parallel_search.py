"""The range test for the learning rate over several processes: the curve, the rate and the run of one."""

from __future__ import annotations

import json

import pytest

from tests.training.parallel_runs import needs_gloo, train_all, train_two, trains_as_one, write_settings

pytestmark = needs_gloo
SEARCH = {"train": {"learning_rate": "search", "samples": 0}}


@pytest.mark.slow
def test_two_processes_find_the_rate_of_one_and_train_with_it(of, tmp_path):
    trains_as_one(of(tmp_path / "one", **SEARCH), of(tmp_path / "two", **SEARCH))
    ours, theirs = (json.loads((tmp_path / name / "learning_rate.json").read_text()) for name in ("two", "one"))
    assert ours["rates"] == theirs["rates"] and ours["chosen"] == theirs["chosen"] != theirs["usual"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


@pytest.mark.slow
def test_a_process_that_is_lost_in_the_search_ends_the_run_in_words(of, tmp_path):
    path = write_settings(tmp_path / "run.yaml", of(tmp_path / "run", **SEARCH))
    zero, one = train_two(path, DIES_AT="8")
    assert one[0] == -9 and zero[0] == 2, (zero, one)
    assert "another of the 2 processes ended" in zero[2] and "Traceback" not in zero[2]
    assert not (tmp_path / "run" / "learning_rate.json").exists()
    train_all(path)
    assert (tmp_path / "run" / "learning_rate.json").exists()
