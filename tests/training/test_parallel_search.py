"""The range test for the learning rate over several processes: the curve, the rate and the run of one."""

from __future__ import annotations

import json

import pytest

from deltaw.training.fit import fit
from tests.training.test_parallel import (
    assert_same_run,
    ended,
    free_port,
    of,
    pytestmark,
    start,
    train,
    uneven,
    write_settings,
)

__all__ = ["pytestmark", "uneven"]


def searching(settings, uneven, output) -> dict:
    made = of(settings, uneven, output)
    made["train"] |= {"learning_rate": "search", "samples": 0}
    return made


@pytest.mark.slow
def test_two_processes_find_the_rate_of_one_and_train_with_it(settings, uneven, tmp_path):
    fit(searching(settings, uneven, tmp_path / "one"))
    path = write_settings(tmp_path / "run.yaml", searching(settings, uneven, tmp_path / "two"))
    zero, one = train(path, 2)
    assert zero[0] == 0 and one == (0, "", ""), (zero, one)
    ours, theirs = (json.loads((tmp_path / name / "learning_rate.json").read_text()) for name in ("two", "one"))
    assert ours["rates"] == theirs["rates"] and ours["chosen"] == theirs["chosen"] != theirs["usual"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_process_that_is_lost_in_the_search_ends_the_run_in_words(settings, uneven, tmp_path):
    path = write_settings(tmp_path / "run.yaml", searching(settings, uneven, tmp_path / "run"))
    port = free_port()
    zero, one = ended([start(0, 2, port, ["train", path]), start(1, 2, port, ["train", path], DIES_AT="8")])
    assert one[0] == -9 and zero[0] == 2, (zero, one)
    assert "another of the 2 processes ended" in zero[2] and "Traceback" not in zero[2]
    assert not (tmp_path / "run" / "learning_rate.json").exists()
    zero, one = train(path, 2)
    assert zero[0] == 0 and one == (0, "", ""), (zero, one)
    assert (tmp_path / "run" / "learning_rate.json").exists()
