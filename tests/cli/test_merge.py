"""`deltaw merge` on the command line: a run becomes a model, verified on its own rows."""

from __future__ import annotations

import json
import shutil

import pytest

from deltaw.training.prompting import Prompting, read_prompting, write_prompting
from tests.cli.conftest import assert_refused


def test_a_run_becomes_a_model_that_is_verified_on_its_held_out_rows(call, finished_run, tmp_path):
    done = call("merge", finished_run, "--output", tmp_path / "model", "--precision", "bf16", "--json", status=0)
    answer = json.loads(done.out)
    assert answer["same_base"] is True and answer["in_memory"] is None
    found = answer["verification"]
    assert found["passed"] and found["rows"] == "held-out rows of the run" and found["count"] == 2
    assert found["adapter"]["mean"] > found["merged"]["mean"] > 0
    assert "rounding to bf16 alone" in done.err
    assert call("generate", tmp_path / "model", "--prompt", "paint it red", "--json").status == 0


@pytest.mark.parametrize("flags", [(), ("--as-adapter", "--rank", "2")], ids=["model", "adapter"])
def test_the_system_prompt_of_the_rows_goes_along_and_their_prompts_do_not(call, finished_run, tmp_path, flags):
    run = shutil.copytree(finished_run, tmp_path / "run")
    write_prompting(run, Prompting("Be brief.", examples=("paint it red",)))
    call("merge", run, "--output", tmp_path / "made", *flags, status=0)
    assert read_prompting(tmp_path / "made") == Prompting("Be brief.")
    done = call("generate", tmp_path / "made", "--prompt", "paint it red", "--max-new-tokens", 1, status=0)
    assert 'system prompt of the rows: "Be brief."' in done.err


def test_what_the_user_got_wrong_ends_with_status_2_and_no_folder(call, finished_run, tmp_path):
    out = tmp_path / "out"
    for flags, said in {
        ("--rank", "2"): "--as-adapter",
        ("--as-adapter",): "is an adapter already",
        ("--shard-size", "many"): "is not a valid size",
        ("--with", "other=x"): "is not a valid weight",
        ("--with", tmp_path / "none"): "no adapter_config.json",
    }.items():
        assert_refused(call("merge", finished_run, "--output", out, *flags), said)
    assert_refused(call("merge", tmp_path / "none", "--output", out), "there is no run")
    assert_refused(call("merge", finished_run, "--output", finished_run), "holds files already")
    assert not out.exists()


def test_a_lower_rank_is_a_run_that_can_be_evaluated(call, finished_run, tmp_path):
    small = tmp_path / "small"
    done = call("merge", finished_run, "--output", small, "--as-adapter", "--rank", "2", "--json", status=0)
    assert 0 < json.loads(done.out)["error"] < 1
    assert call("eval", small, "--no-drift", "--json").status == 0
