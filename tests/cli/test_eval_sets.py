"""`deltaw eval` on a run with several evaluation sets in `data.eval`."""

from __future__ import annotations

import json

import pytest

from deltaw.runs.fit import fit
from tests.cli.conftest import assert_refused


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory, rows_file):
    """Train a run that is evaluated on two held-out rows and on a file."""
    folder = tmp_path_factory.mktemp("sets")
    other = folder / "other.jsonl"
    other.write_text("".join(rows_file.read_text().splitlines(keepends=True)[:3]))
    sets = {"held_out": 2, "other": str(other)}
    return fit(settings(folder / "run", data={"eval": sets}, train={"drift": False})).output


def test_all_sets_are_evaluated_by_name(call, run):
    output = json.loads(call("eval", run, "--with-base", "--no-drift", "--json").out)
    assert output["rows"] == {"held_out": 2, "other": 3}
    assert output["eval"].keys() == output["base"].keys() == {"held_out", "other"}
    assert output["eval"]["other"]["loss"] != output["eval"]["held_out"]["loss"]
    assert output["eval"]["other"]["loss"] < output["base"]["other"]["loss"]

    # The run's score is that of its first set. Passing a set's rows as a file gives the same metrics.
    single_set = json.loads(call("eval", run, "--set", "held_out", "--no-drift", "--json").out)
    assert single_set["eval"] == {"held_out": output["eval"]["held_out"]} and single_set["score"] == output["score"]
    as_file = json.loads(call("eval", run, "--data", run.parent / "other.jsonl", "--no-drift", "--json").out)
    assert as_file["rows"] == 3 and as_file["eval"]["loss"] == pytest.approx(output["eval"]["other"]["loss"])


def test_each_set_gets_table_limited_to_rows_and_answers(call, run):
    result = call("eval", run, "--limit", 1, "--answers", 1, "--no-drift", status=0)
    first = result.out.index("held_out: 1 row\n")
    second = result.out.index("other: 1 row\n")
    for section in (result.out[first:second], result.out[second:]):
        assert "perplexity" in section and "paint it" in section
    assert "of them are also training rows" in " ".join(result.out.split())


def test_unknown_set_is_rejected(call, run, finished_run, rows_file):
    assert_refused(call("eval", run, "--set", "trivia"), "no evaluation set 'trivia'", "held_out, other")
    assert_refused(call("eval", finished_run, "--set", "trivia"), "remove --set")
    assert_refused(call("eval", run, "--data", rows_file, "--set", "other"), "remove one")
