"""`deltaw train` is killed and restarted with the same command."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import assert_refused, start, tree, update_file
from tests.training.runs import assert_same_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="requires POSIX signals")


def resumable_flags(flags, run, **overrides):
    # Steps are short, so the process is usually killed during an evaluation or a checkpoint.
    options = {"train__epochs": 150, "train__checkpoint_every": 7, "train__eval_every": 20, "data.eval": 2, **overrides}
    return flags(run, **options)


def count_metric_lines(run):
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_lines(process, run, count):
    before = count_metric_lines(run)
    process.wait_for(lambda: count_metric_lines(run) != before and count_metric_lines(run) > count)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_run_killed_three_times_equals_uninterrupted_run(flags, tmp_path, call, number):
    reference = tmp_path / "whole"
    run = tmp_path / "run"
    assert call("train", *resumable_flags(flags, reference)).status == 0
    for count in range(3):
        with start("train", *resumable_flags(flags, run)) as process:
            wait_for_lines(process, run, 30 + 60 * count)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), err
        if number != signal.SIGKILL:
            assert f"deltaw train --resume {run}" in out and "interrupted after" in out
    result = call("train", *resumable_flags(flags, run), "--json")
    output = json.loads(result.out)
    assert result.status == 0 and output["resumed_from_step"] > 50
    assert output["checkpoints"] and all(os.path.isdir(path) for path in output["checkpoints"])
    assert_same_run(run, reference)


def test_lock_is_held_only_by_living_process(flags, tmp_path, call):
    run = tmp_path / "run"
    with start("train", *flags(run, train__epochs=100000, train__checkpoint_every=5)) as process:
        wait_for_lines(process, run, 12)
        result = call("train", *flags(run, train__epochs=100000))
        assert result.status == 2 and f"process {process.pid} is training into this folder" in result.err
        assert result.err.count("\n") == 3 and process.poll() is None
        process.kill()
        process.wait(60)
    resumed = call("train", "--resume", run, "--train.max_steps", 20)
    assert resumed.status in (0, 2), resumed.err
    assert "resumes from" in resumed.out + resumed.err or "has done" in resumed.err


def test_second_signal_stops_immediately_with_checkpoint(flags, tmp_path):
    run = tmp_path / "run"
    with start("train", *flags(run, train__epochs=100000, train__checkpoint_every=2)) as process:
        wait_for_lines(process, run, 6)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGTERM) and "Traceback" not in err
    assert list((run / "checkpoints").glob("step-*"))


def test_resume_and_fresh_flags(flags, tmp_path, call):
    run = tmp_path / "run"
    assert call("train", *flags(run, train__epochs=2)).status == 0
    assert_refused(call("train", "--resume", run), "has done")
    result = call("train", "--resume", run, "--train.epochs", 4, "--json")
    assert result.status == 0 and json.loads(result.out)["resumed_from_step"] == 4
    assert json.loads(result.out)["steps"] == 8
    assert_refused(call("train", "--resume", run, "--train.epochs", 5, "--lora.rank", 3), "'lora.rank' is 3")
    assert_refused(call("train", run / "run.yaml", "--resume", run), "its stored settings")
    assert call("train", "--resume", run, "--output", tmp_path / "other").status == 2
    assert call("train", "--resume", run, "--fresh").status == 2
    assert_refused(call("train", "--resume", tmp_path / "nowhere"), "no run to resume")
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "other").exists()


def test_repeated_command_on_finished_run_prints_next_commands(call, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a run.yaml").write_text(yaml.safe_dump(settings("runs/mine")))
    command = ("train", "a run.yaml")
    first = json.loads(call(*command, "--json", status=0).out)
    before = tree(Path("runs"))
    repeated = call(*command, status=0)
    lines = repeated.out.splitlines()
    assert repeated.err == "" and len(lines) == 5 and max(map(len, lines)) <= 80
    assert lines[0].startswith("runs/mine is finished: 20") and ", 3 steps, exact match" in lines[0]
    output = json.loads(call(*command, "--json", status=0).out)
    assert first["seconds_by_part"].pop("starting") > 0 and first.pop("total_seconds") > output.pop("total_seconds")
    assert output == first
    assert "'train.share_prefixes' is False" in call(*command, "--train.share_prefixes", "false", status=0).out
    assert tree(Path("runs")) == before
    commands = [shlex.split(line.removeprefix("next: deltaw "), comments=True) for line in lines[2:]]
    resume_command, fresh, other = commands
    other[other.index("OTHER")] = "runs/other"
    for command_line, steps in ((resume_command, 6), (fresh, 3), (other, 3)):
        assert json.loads(call(*command_line, "--json", status=0).out)["steps"] == steps
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mine", "mine.1", "other"]


def test_changed_settings_or_rows_of_finished_run_are_rejected(call, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"paint it {n}", "completion": str(n)}) for n in range(11)]
    Path("rows.jsonl").write_text("\n".join(rows[:10]))
    Path("mine.yaml").write_text(yaml.safe_dump(settings("runs/mine", data={"train": "rows.jsonl"})))
    command = ("train", "mine.yaml")
    call(*command, status=0)
    before = tree(Path("runs"))
    for flags, words in (
        (("--lora.rank", 3, "--train.seed", 5), ("'lora.rank' is 3", "started with 4", "'train.seed' is 5", "--fresh")),
        (("--train.epochs", 2), ("'train.epochs' is 2,", "deltaw train --resume runs/mine --train.epochs 2, or")),
        (("--train.epochs", 0.5), ("'train.epochs' is 0.5,", "hint:  start over")),
        (("--train.eval_answers", 1), ("'train.eval_answers' is 1",)),
    ):
        result = call(*command, *flags)
        assert_refused(result, "is finished", *words)
        assert max(map(len, result.err.splitlines())) <= 80
    Path("rows.jsonl").write_text("\n".join(rows))
    assert_refused(call(*command), "the rows to train on have changed, and the run is finished", "--fresh")
    assert tree(Path("runs")) == before


def test_resume_without_checkpoint_or_run_gives_hint(call, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_checkpoints = {"train__checkpoint_every": "null", "train__checkpoint_minutes": "null"}
    call("train", *flags("runs/off", **without_checkpoints), status=0)
    result = call("train", "--resume", "runs/off", "--train.epochs", 2)
    assert_refused(result, "no checkpoint to resume from", "checkpoint_minutes are null", "runs/off/run.yaml --fresh")
    update_file(Path("runs/off/run.json"), state="running", process={})
    update_file(Path("runs/off/run.yaml"), train={"checkpoint_minutes": 1.0})
    assert_refused(call("train", "--resume", "runs/off"), "before its first one (killed after 2 steps)")
    for name, hint in (
        ("off", "did you mean 'runs/off'"),
        ("runs/of", "did you mean 'runs/off'"),
        ("runs/off/run.yaml", "use the run's folder: runs/off"),
        ("elsewhere", "runs/off"),
    ):
        assert_refused(call("train", "--resume", name), "no run to resume", hint)
    assert_refused(call("train", "runs/off"), "the folder of a run", "deltaw train --resume runs/off")


def test_rejected_resume_leaves_run_unchanged(flags, tmp_path, call):
    run = tmp_path / "run"
    assert call("train", *flags(run)).status == 0
    before = tree(run)
    for changes in (["--train.batch_size", 2], ["--train.seed", 5], ["--method", "head"], ["--train.epochs", 0.1]):
        assert call("train", "--resume", run, "--train.epochs", 3, *changes).status == 2
        assert tree(run) == before
    for damage in (b"", b"{}", b"\xff" * 30):
        (run / "run.json").write_bytes(damage)
        assert call("train", "--resume", run, "--train.epochs", 3).status == 2
        (run / "run.json").write_bytes(before["run.json"])
    assert tree(run) == before
