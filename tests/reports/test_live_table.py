"""Runs are followed from another terminal as lines, as a live table or as JSON."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from deltaw.reports import live_table
from deltaw.reports.tables import TerminalOutput
from deltaw.runs.folder import Run, process_identity
from tests.reports.run_folders import write_run


class Clock:
    """Fake time of a watcher. Each sleep triggers the next event."""

    def __init__(self, *events):
        self.now = 0.0
        self.events = [*events]

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= live_table.REFRESH
        self.now += seconds
        if not self.events:
            raise KeyboardInterrupt
        self.events.pop(0)()


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Return a function that watches runs during events and returns status and output."""
    monkeypatch.chdir(tmp_path)

    def run(*names, events=(), emit=None, **console):
        monkeypatch.setattr(live_table, "time", Clock(*events))
        out = TerminalOutput(file=io.StringIO(), width=80, color_system=None, **console)
        return live_table.watch(names, out, emit), out.file.getvalue()

    return run


def write_later(folder, state, steps, **values):
    """Return a function that writes a run in this state."""
    return lambda: rewrite_run(folder, state, steps, **values)


def rewrite_run(folder, state, steps, **values):
    shutil.rmtree(folder, ignore_errors=True)
    write_run(folder, state=state, steps=steps)
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "total_steps": 60, **values}))


def test_watch_waits_follows_and_prints_result(follow, tmp_path):
    demo = tmp_path / "runs" / "demo"
    events = [write_later(demo, "running", 5), write_later(demo, "running", 20), write_later(demo, "finished", 60)]
    status, output = follow("demo", events=events, force_terminal=False)
    lines = output.splitlines()
    assert status == 0 and "\x1b" not in output and "\r" not in output
    assert lines[0] == "waiting for demo to start"
    assert lines[1].startswith("step 5/60  loss ") and "left" in lines[1] and "GB" in lines[1]
    held_out = [line for line in lines if line.startswith("held-out loss ")]
    assert held_out[-1].endswith("at step 20") and len(held_out) == len(set(held_out))
    assert "finished after 60 steps in 25 s; held-out loss" in " ".join(lines[-2:])
    assert max(map(len, lines)) <= 80


UNFINISHED_RUNS = [("failed", {"error": {"what": "the disk is full\nin the folder"}}, "failed after 5 steps")]
UNFINISHED_RUNS += [("running", {"process": {**process_identity(), "id": 2**22 + 1}}, "killed after 5 steps")]
UNFINISHED_RUNS += [("interrupted", {}, "interrupted after 5 steps")]


@pytest.mark.parametrize(("state", "values", "word"), UNFINISHED_RUNS)
def test_unfinished_run_prints_reason(follow, tmp_path, state, values, word):
    demo = tmp_path / "demo"
    rewrite_run(demo, "running", 5)
    status, output = follow(demo, events=[write_later(demo, state, 5, **values)], force_terminal=False)
    text = " ".join(output.split())
    assert status == 1 and word in text
    assert {"failed": "the disk is full", "running": "its process is gone", "interrupted": "Ctrl-C"}[state] in text


def test_terminal_shows_line_for_one_run_and_table_for_several(follow, tmp_path):
    first = tmp_path / "runs" / "one"
    second = tmp_path / "runs" / "other"
    rewrite_run(first, "running", 20)
    status, output = follow(events=[write_later(first, "finished", 60)], force_terminal=True)
    assert status == 0 and "step 20/60" in output and "held-out loss" in output
    for run in (first, second):
        rewrite_run(run, "running", 20)
    events = [write_later(first, "finished", 60), write_later(second, "failed", 30)]
    status, output = follow(events=events, force_terminal=True)
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", output)
    assert status == 1 and re.search(r"other +20/60 +running", plain) and "one: finished after 60 steps" in plain
    assert max(map(len, plain.replace("\r", "\n").splitlines())) <= 80
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor is restored


def test_json_emits_object_per_change(follow, tmp_path):
    demo = tmp_path / "demo"
    values = []
    rewrite_run(demo, "running", 20)
    events = [lambda: None, write_later(demo, "running", 40, total_steps=None), write_later(demo, "finished", 60)]
    status, _ = follow(demo, events=events, emit=values.append, force_terminal=False)
    assert status == 0 and [value["step"] for value in values] == [20, 40, 60]
    first = values[0]
    assert first["state"] == "running" and first["total_steps"] == 60 and first["evaluation"]["step"] == 20
    assert first["memory_bytes"] > 1_000_000 and first["seconds_left"] == pytest.approx(16.4, rel=0.1)
    assert values[-1]["seconds_left"] is None and json.dumps(values, allow_nan=False)


def test_ctrl_c_exits_quietly_without_touching_run(follow, tmp_path):
    demo = tmp_path / "demo"
    rewrite_run(demo, "running", 20)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in demo.iterdir()}
    for terminal in (False, True):
        status, output = follow(demo, force_terminal=terminal)
        assert status == 130 and "interrupted" not in output
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in demo.iterdir()} == before


def test_run_that_finishes_between_reads_is_not_reported_killed(tmp_path, monkeypatch):
    rewrite_run(tmp_path / "demo", "finished", 60)
    states = iter(["killed"])
    monkeypatch.setattr(Run, "state", property(lambda run: next(states, run.values["state"])))
    assert live_table._read(tmp_path / "demo").state == "finished"


def test_similar_run_name_is_suggested_while_waiting(follow, tmp_path):
    rewrite_run(tmp_path / "runs" / "demo", "finished", 60)
    status, output = follow("demmo", force_terminal=False)
    assert status == 130 and output == "waiting for demmo to start (did you mean 'demo'?)\n"


@pytest.mark.slow
def test_watch_prints_json_lines_and_rejects_report(tmp_path):
    rewrite_run(tmp_path / "demo", "finished", 60)
    command = [sys.executable, "-m", "deltaw", "runs", "--watch", str(tmp_path / "demo")]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 0 and json.loads(result.stdout)["state"] == "finished"
    assert result.stdout.count("\n") == 1
    result = subprocess.run([*command, "--report"], capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 2 and "--watch cannot be combined" in result.stderr and not result.stdout
