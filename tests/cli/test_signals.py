"""Ctrl-C and SIGTERM in the midst of a training: the adapter is saved, whole, and the status says so."""

from __future__ import annotations

import json
import os
import signal

import pytest

from deltaw.training.origin import open_run
from tests import processes
from tests.cli.conftest import start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of another kind")


# `deltaw … | head -c 1`, or with `2>&1`.
HEAD = """
import os, sys, threading
reading, writing = os.pipe()
for stream in map(int, sys.argv.pop(1)):
    os.dup2(writing, stream)
sys.kept = sys.stdout, sys.stderr  # of a file, and they would close it
sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
threading.Thread(target=lambda: (os.read(reading, 1), os.close(reading)), daemon=True).start()
from deltaw.cli import main
main()
"""


def into_a_pipe_that_closes(streams, *arguments):
    with processes.start("-c", HEAD, streams, *arguments) as process:
        said = process.communicate(timeout=120)
    return process.returncode, *said


@pytest.mark.parametrize("streams", ["1", "12"])
def test_a_pipe_that_closes_does_not_end_a_training(flags, tmp_path, streams):
    run = tmp_path / "run"
    assert into_a_pipe_that_closes(streams, "train", *flags(run, train__epochs=20)) == (0, "", "")
    told = json.loads((run / "run.json").read_text())
    assert told["state"] == "finished" and told["result"]["steps"] == 40 and (run / "report.html").is_file()


def test_a_pipe_that_closes_ends_what_only_prints_and_errors_keep_their_status(finished_run, flags, tmp_path):
    shown = ("data", "show", *flags(tmp_path)[3:4], *flags(tmp_path)[:2])
    for arguments in (("runs", finished_run), shown, ("eval", finished_run, "--json")):
        assert into_a_pipe_that_closes("12", *arguments) == (0, "", ""), arguments
    for arguments in (("eval", tmp_path / "nothere"), ("train", *flags(tmp_path / "run", model="nothere"))):
        assert into_a_pipe_that_closes("12", *arguments) == (2, "", ""), arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_training_saves_the_adapter(flags, tmp_path, number):
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    with start("train", *flags(run, train__epochs=100000), "--json") as process:
        process.until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after" in err and str(run) in err and "Traceback" not in err
    told = json.loads(out)
    assert told["interrupted"] is True and told["steps"] >= 3 and told["eval"] is None
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(told["steps"] + 1))  # before the first one, the base model is evaluated
    assert "interrupted before its last step" in (run / "README.md").read_text()
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    opened = open_run(str(run), precision="fp32", device="cpu", say=lambda line: None)
    assert any(bool(p.any()) for n, p in opened.model.named_parameters() if n.endswith("lora_B"))
