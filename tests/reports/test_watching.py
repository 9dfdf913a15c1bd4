"""Runs followed from another terminal: read while they are written, shown as lines, drawings or values."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from deltaw.reports import watching
from deltaw.reports.tables import Output
from deltaw.runs.folder import Run, this_process
from tests.reports.run_folders import write_run


class Clock:
    """The time of a watcher: each look is followed by the next thing that happens to the runs."""

    def __init__(self, *happens):
        self.now, self.happens = 0.0, [*happens]

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= watching.REFRESH
        self.now += seconds
        if not self.happens:
            raise KeyboardInterrupt
        self.happens.pop(0)()


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Watch runs of this folder while things happen; the status and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*names, happens=(), emit=None, **console):
        monkeypatch.setattr(watching, "time", Clock(*happens))
        out = Output(file=io.StringIO(), width=80, color_system=None, **console)
        return watching.watch(names, out, emit), out.file.getvalue()

    return run


def at(folder, state, steps, **more):
    """A run as it stands after some steps."""
    return lambda: changed_run(folder, state, steps, **more)


def changed_run(folder, state, steps, **more):
    shutil.rmtree(folder, ignore_errors=True)
    write_run(folder, state=state, steps=steps)
    file = folder / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "total_steps": 60, **more}))


def test_a_run_is_waited_for_followed_and_ends_with_its_result(follow, tmp_path):
    demo = tmp_path / "runs" / "demo"
    happens = [at(demo, "running", 5), at(demo, "running", 20), at(demo, "finished", 60)]
    status, said = follow("demo", happens=happens, force_terminal=False)
    lines = said.splitlines()
    assert status == 0 and "\x1b" not in said and "\r" not in said
    assert lines[0] == "waiting for demo to start"
    assert lines[1].startswith("step 5/60  loss ") and "left" in lines[1] and "GB" in lines[1]
    held_out = [line for line in lines if line.startswith("held-out loss ")]
    assert held_out[-1].endswith("at step 20") and len(held_out) == len(set(held_out))
    assert "finished after 60 steps in 25 s; held-out loss" in " ".join(lines[-2:])
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("state", "more", "word"),
    [
        ("failed", {"error": {"what": "the disk is full\nin the folder"}}, "failed after 5 steps"),
        ("running", {"process": {**this_process(), "id": 2**22 + 1}}, "killed after 5 steps"),
        ("interrupted", {}, "interrupted after 5 steps"),
    ],
)
def test_a_run_that_does_not_finish_says_why(follow, tmp_path, state, more, word):
    demo = tmp_path / "demo"
    changed_run(demo, "running", 5)
    status, said = follow(demo, happens=[at(demo, state, 5, **more)], force_terminal=False)
    told = " ".join(said.split())
    assert status == 1 and word in told
    assert {"failed": "the disk is full", "running": "its process is gone", "interrupted": "Ctrl-C"}[state] in told


def test_a_terminal_draws_one_run_as_a_line_and_several_as_a_table(follow, tmp_path):
    one, other = tmp_path / "runs" / "one", tmp_path / "runs" / "other"
    changed_run(one, "running", 20)
    status, said = follow(happens=[at(one, "finished", 60)], force_terminal=True)
    assert status == 0 and "step 20/60" in said and "held-out loss" in said
    for run in (one, other):
        changed_run(run, "running", 20)
    status, said = follow(happens=[at(one, "finished", 60), at(other, "failed", 30)], force_terminal=True)
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", said)
    assert status == 1 and re.search(r"other +20/60 +running", plain) and "one: finished after 60 steps" in plain
    assert max(map(len, plain.replace("\r", "\n").splitlines())) <= 80
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h")  # the cursor is shown again


def test_values_come_one_object_at_a_time_whenever_a_run_changes(follow, tmp_path):
    demo, values = tmp_path / "demo", []
    changed_run(demo, "running", 20)
    happens = [lambda: None, at(demo, "running", 40, total_steps=None), at(demo, "finished", 60)]
    status, _ = follow(demo, happens=happens, emit=values.append, force_terminal=False)
    assert status == 0 and [value["step"] for value in values] == [20, 40, 60]
    first = values[0]
    assert first["state"] == "running" and first["total_steps"] == 60 and first["evaluation"]["step"] == 20
    assert first["memory_bytes"] > 1_000_000 and first["seconds_left"] == pytest.approx(16.4, rel=0.1)
    assert values[-1]["seconds_left"] is None and json.dumps(values, allow_nan=False)


def test_ctrl_c_leaves_quietly_and_the_run_as_it_is(follow, tmp_path):
    demo = tmp_path / "demo"
    changed_run(demo, "running", 20)
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in demo.iterdir()}
    for terminal in (False, True):
        status, said = follow(demo, force_terminal=terminal)
        assert status == 130 and "interrupted" not in said
    assert {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in demo.iterdir()} == before


def test_a_process_that_ends_between_two_looks_is_not_taken_for_killed(tmp_path, monkeypatch):
    changed_run(tmp_path / "demo", "finished", 60)
    states = iter(["killed"])
    monkeypatch.setattr(Run, "state", property(lambda run: next(states, run.values["state"])))
    assert watching._read(tmp_path / "demo").state == "finished"


def test_a_name_that_is_nearly_a_runs_is_waited_for_with_a_hint(follow, tmp_path):
    changed_run(tmp_path / "runs" / "demo", "finished", 60)
    status, said = follow("demmo", force_terminal=False)
    assert status == 130 and said == "waiting for demmo to start (did you mean 'demo'?)\n"


@pytest.mark.slow
def test_the_verb_prints_lines_of_json_and_refuses_other_work(tmp_path):
    changed_run(tmp_path / "demo", "finished", 60)
    command = [sys.executable, "-m", "deltaw", "runs", "--watch", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "finished" and done.stdout.count("\n") == 1
    done = subprocess.run([*command, "--report"], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2 and "--watch only follows runs" in done.stderr and not done.stdout
