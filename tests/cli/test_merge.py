"""`deltaw merge` on the command line: a run becomes a model, verified on its own rows."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Call


def test_a_run_becomes_a_model_that_is_verified_on_its_held_out_rows(
    call: Call, finished_run: Path, tmp_path: Path
) -> None:
    done = call("merge", str(finished_run), "--output", str(tmp_path / "model"), "--precision", "bf16", "--json")
    assert done.status == 0, done.err
    answer = json.loads(done.out)
    assert answer["same_base"] is True and answer["in_memory"] is None
    found = answer["verification"]
    assert found["passed"] and found["rows"] == "held-out rows of the run" and found["count"] == 2
    assert found["adapter"]["mean"] > found["merged"]["mean"] > 0
    assert "rounding to bf16 alone" in done.err
    generated = call("generate", str(tmp_path / "model"), "--prompt", "paint it red", "--json")
    assert generated.status == 0, generated.err


def test_what_the_user_got_wrong_ends_with_status_2_and_no_folder(
    call: Call, finished_run: Path, tmp_path: Path
) -> None:
    run, out = str(finished_run), tmp_path / "out"
    for arguments, said in (
        (["merge", str(tmp_path / "none"), "--output", str(out)], "there is no adapter"),
        (["merge", run, "--output", str(out), "--rank", "2"], "--as-adapter"),
        (["merge", run, "--output", str(out), "--as-adapter"], "is an adapter already"),
        (["merge", run, "--output", str(out), "--shard-size", "many"], "is not a valid size"),
        (["merge", run, "--output", str(out), "--with", "other=x"], "is not a valid weight"),
        (["merge", run, "--output", str(out), "--with", str(tmp_path / "none")], "no adapter_config.json"),
        (["merge", run, "--output", run], "holds files already"),
    ):
        ended = call(*arguments)
        assert ended.status == 2 and said in ended.err, (arguments, ended.err)
        assert "Traceback" not in ended.err and not out.exists()


def test_a_lower_rank_is_a_run_that_can_be_evaluated(call: Call, finished_run: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    done = call("merge", str(finished_run), "--output", str(small), "--as-adapter", "--rank", "2", "--json")
    assert done.status == 0, done.err
    assert 0 < json.loads(done.out)["error"] < 1
    assert call("eval", str(small), "--no-drift", "--json").status == 0
