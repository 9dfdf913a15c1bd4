"""`deltaw eval` on a run whose `data.eval` names several sets: all of them, or those that are asked for."""

from __future__ import annotations

import json

import pytest

from deltaw.runs.fit import fit
from tests.cli.conftest import assert_refused


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory, rows_file):
    """A run that holds two rows out and is also evaluated on a file."""
    folder = tmp_path_factory.mktemp("sets")
    other = folder / "other.jsonl"
    other.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    sets = {"held_out": 2, "other": str(other)}
    return fit(settings(folder / "run", data={"eval": sets}, train={"drift": False})).output


def test_all_sets_are_evaluated_under_their_names(call, run):
    told = json.loads(call("eval", run, "--base", "--no-drift", "--json").out)
    assert told["rows"] == {"held_out": 2, "other": 3}
    assert told["eval"].keys() == told["base"].keys() == {"held_out", "other"}
    assert told["eval"]["other"]["loss"] != told["eval"]["held_out"]["loss"]
    assert told["eval"]["other"]["loss"] < told["base"]["other"]["loss"]

    # The first set's score is the run's, and a set's metrics are those of its rows given as a file.
    alone = json.loads(call("eval", run, "--set", "held_out", "--no-drift", "--json").out)
    assert alone["eval"] == {"held_out": told["eval"]["held_out"]} and alone["score"] == told["score"]
    as_file = json.loads(call("eval", run, "--data", run.parent / "other.jsonl", "--no-drift", "--json").out)
    assert as_file["rows"] == 3 and as_file["eval"]["loss"] == pytest.approx(told["eval"]["other"]["loss"])


def test_a_table_for_each_set_with_so_many_rows_and_answers(call, run):
    ended = call("eval", run, "--rows", 1, "--answers", 1, "--no-drift", status=0)
    first, second = ended.out.index("held_out: 1 row\n"), ended.out.index("other: 1 row\n")
    for part in (ended.out[first:second], ended.out[second:]):
        assert "perplexity" in part and "paint it" in part
    assert "of them are also training rows" in " ".join(ended.out.split())


def test_a_set_that_is_not_there_is_refused(call, run, finished_run, rows_file):
    assert_refused(call("eval", run, "--set", "trivia"), "no evaluation set 'trivia'", "held_out, other")
    assert_refused(call("eval", finished_run, "--set", "trivia"), "leave out --set")
    assert_refused(call("eval", run, "--data", rows_file, "--set", "other"), "leave out one")
