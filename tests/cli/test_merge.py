"""`deltaw merge` on the command line: a run becomes a model that is verified on its rows."""

from __future__ import annotations

import json
import shutil

import pytest

from deltaw.inference.prompting import Prompting, read_prompting, write_prompting
from tests.cli.conftest import assert_refused


def test_merge_verifies_on_held_out_rows(call, finished_run, tmp_path):
    result = call("merge", finished_run, "--output", tmp_path / "model", "--precision", "bf16", "--json", status=0)
    output = json.loads(result.out)
    assert output["same_base"] is True and output["in_memory"] is None
    verification = output["verification"]
    assert verification["passed"] and verification["rows"] == "held-out rows of the run" and verification["count"] == 2
    assert verification["adapter"]["mean"] > verification["merged"]["mean"] > 0
    assert "rounding to bf16 alone" in result.err
    assert call("generate", tmp_path / "model", "--prompt", "paint it red", "--json").status == 0


@pytest.mark.parametrize("flags", [(), ("--as-adapter", "--rank", "2")], ids=["model", "adapter"])
def test_merge_copies_system_prompt_without_example_prompts(call, finished_run, tmp_path, flags):
    run = shutil.copytree(finished_run, tmp_path / "run")
    write_prompting(run, Prompting("Be brief.", examples=("paint it red",)))
    call("merge", run, "--output", tmp_path / "made", *flags, status=0)
    assert read_prompting(tmp_path / "made") == Prompting("Be brief.")
    result = call("generate", tmp_path / "made", "--prompt", "paint it red", "--max-new-tokens", 1, status=0)
    assert 'system prompt of the rows: "Be brief."' in result.err


def test_invalid_arguments_are_rejected_without_output(call, finished_run, tmp_path):
    out = tmp_path / "out"
    for flags, message in {
        ("--rank", "2"): "--as-adapter",
        ("--as-adapter",): "needs no conversion",
        ("--shard-size", "many"): "is not a valid size",
        ("--with", "other=x"): "is not a valid weight",
        ("--with", tmp_path / "none"): "no adapter_config.json",
    }.items():
        assert_refused(call("merge", finished_run, "--output", out, *flags), message)
    assert_refused(call("merge", tmp_path / "none", "--output", out), "no run '")
    assert_refused(call("merge", finished_run, "--output", finished_run), "already contains files")
    assert not out.exists()


def test_lower_rank_adapter_can_be_evaluated(call, finished_run, tmp_path):
    small = tmp_path / "small"
    result = call("merge", finished_run, "--output", small, "--as-adapter", "--rank", "2", "--json", status=0)
    assert 0 < json.loads(result.out)["error"] < 1
    assert call("eval", small, "--no-drift", "--json").status == 0
