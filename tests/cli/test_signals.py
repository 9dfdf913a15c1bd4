"""Ctrl-C and SIGTERM during training save a complete adapter and set the exit status."""

from __future__ import annotations

import json
import os
import signal

import pytest

from deltaw.inference.open_run import open_run
from tests import processes
from tests.cli.conftest import start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="requires POSIX signals")


# `deltaw … | head -c 1`, or with `2>&1`.
CLOSING_PIPE_CODE = """
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


def run_with_closing_pipe(streams, *arguments):
    with processes.start("-c", CLOSING_PIPE_CODE, streams, *arguments) as process:
        output = process.communicate(timeout=120)
    return process.returncode, *output


@pytest.mark.parametrize("streams", ["1", "12"])
def test_closed_pipe_does_not_stop_training(flags, tmp_path, streams):
    run = tmp_path / "run"
    assert run_with_closing_pipe(streams, "train", *flags(run, train__epochs=20)) == (0, "", "")
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished" and record["result"]["steps"] == 40 and (run / "report.html").is_file()


def test_closed_pipe_stops_printing_and_errors_keep_status(finished_run, flags, tmp_path):
    show_command = ("data", "show", *flags(tmp_path)[3:4], *flags(tmp_path)[:2])
    for arguments in (("runs", finished_run), show_command, ("eval", finished_run, "--json")):
        assert run_with_closing_pipe("12", *arguments) == (0, "", ""), arguments
    for arguments in (("eval", tmp_path / "nothere"), ("train", *flags(tmp_path / "run", model="nothere"))):
        assert run_with_closing_pipe("12", *arguments) == (2, "", ""), arguments


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_training_saves_adapter(flags, tmp_path, number):
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    with start("train", *flags(run, train__epochs=100000), "--json") as process:
        process.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after" in err and str(run) in err and "Traceback" not in err
    record = json.loads(out)
    assert record["interrupted"] is True and record["steps"] >= 3 and record["eval"] is None
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(record["steps"] + 1))  # step 0 is the evaluation of the base model
    assert "interrupted before its last step" in (run / "README.md").read_text()
    assert not [p for p in run.iterdir() if p.name.startswith(".")]
    session = open_run(str(run), precision="fp32", device="cpu", log=lambda line: None)
    assert any(bool(p.any()) for n, p in session.model.named_parameters() if n.endswith("lora_B"))
