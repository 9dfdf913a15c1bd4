"""`deltaw runs`: lists, compares and shows runs, old and broken ones too."""

from __future__ import annotations

import json
import shutil

import pytest

from deltaw.runs.folder import RunLock
from tests.cli.conftest import assert_refused, changed
from tests.reports.html_pages import Page
from tests.reports.run_folders import write_factors, write_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with runs of every state below `runs`, which is the current one's."""
    monkeypatch.chdir(tmp_path)
    write_factors(write_run(tmp_path / "runs" / "one"))
    changed = {"lora": {"rank": 64, "alpha": 8.0}}
    write_run(tmp_path / "runs" / "sweep" / "two", state="interrupted", settings=changed, seed=1)
    write_run(tmp_path / "runs" / "broken", state="failed", steps=3)
    write_run(tmp_path / "runs" / "old", state=None)
    (tmp_path / "runs" / "not a run").mkdir()
    return tmp_path


def test_runs_are_listed_with_their_state(call, folder):
    ended = call("runs")
    assert ended.status == 0 and ended.err == ""
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.strip()}
    for name, state in {"one": "finished", "two": "interrupted", "broken": "failed", "old": "unknown"}.items():
        assert state in lines[name], name
    assert "exact match 80.0%" in lines["one"] and "not a run" not in ended.out
    assert max(len(line) for line in ended.out.splitlines()) <= 80
    assert "a wider terminal also shows" in ended.out
    assert call("runs", folder / "runs").out == ended.out
    assert {"one", "two"} & set(call("runs", "sweep").out.split()) == {"two"}


def test_runs_as_json(call, folder):
    told = json.loads(call("runs", "--json").out)
    runs = {run["name"]: run for run in told["runs"]}
    assert runs.keys() == {"one", "two", "broken", "old"}
    one = runs["one"]
    assert one["state"] == "finished" and one["steps"] == one["total_steps"] == 60 and one["rows"] == 960
    assert one["score"] == {"metric": "exact_match", "value": 0.8}
    assert one["peak_memory_bytes"] == 1_010_000_000 and 0.4 < one["held_out_loss"] < 0.6
    assert runs["old"]["peak_memory_bytes"] is None and runs["two"]["total_steps"] == 120


def test_runs_say_why_they_failed(call, folder):
    changed(folder / "runs" / "broken" / "run.json", error={"what": "the disk is full\n  in /tmp", "where": "/tmp"})
    gone = write_run(folder / "runs" / "gone", state="running", steps=3)
    # From another host, where a process is not known by its number: nobody has the lock.
    changed(gone / "run.json", process={"host": "elsewhere", "id": 1, "begun": 0.0})
    ended = call("runs", status=0)
    assert "broken: the disk is full\n" in ended.out and "gone: its process is gone" in ended.out
    assert max(len(line) for line in ended.out.splitlines()) <= 80 and "…  " not in ended.out
    runs = {run["name"]: run for run in json.loads(call("runs", "--json").out)["runs"]}
    assert runs["broken"]["error"]["where"] == "/tmp" and runs["broken"]["reason"] == "the disk is full"
    assert runs["gone"]["state"] == "killed" and runs["one"]["reason"] is runs["one"]["error"] is None
    assert "Ctrl-C" in runs["two"]["reason"]
    lock = RunLock(gone)
    assert [run["state"] for run in json.loads(call("runs", gone, "--json").out)["runs"]] == ["running"]
    lock.release()


def test_two_runs_are_compared_on_the_terminal_and_on_a_page(call, folder):
    ended = call("runs", "one", folder / "runs" / "sweep" / "two", "--output", "page.html", status=0)
    (rank,) = [line for line in ended.out.splitlines() if line.startswith("lora.rank")]
    assert rank.split() == ["lora.rank", "4", "64"]
    assert "lora.alpha" not in ended.out and "held-out exact match" in ended.out
    page = Page((folder / "page.html").read_text())
    assert page.faults == [] and "2 runs compared" in page.text
    assert max(len(line) for line in ended.out.splitlines()) <= 80


def test_reports_are_written_again(call, folder):
    assert not (folder / "runs" / "one" / "report.html").exists()
    ended = call("runs", "one", "--report")
    assert ended.status == 0 and "report.html" in ended.out
    assert Page((folder / "runs" / "one" / "report.html").read_text()).faults == []


def test_names_that_mean_nothing_are_refused_with_the_nearest(call, folder):
    assert_refused(call("runs", "onne"), "did you mean 'one'")
    assert_refused(call("runs", "one", "--output", "page.html"), "two")
    inside_a_file = folder / "runs" / "one" / "run.yaml" / "page.html"
    assert_refused(call("runs", "one", "old", "--output", inside_a_file), "cannot write")
    shutil.rmtree(folder / "runs")
    ended = call("runs")
    assert ended.status == 0 and "no runs in runs" in ended.out


def test_a_real_run_is_listed(call, finished_run):
    (run,) = json.loads(call("runs", finished_run, "--json").out)["runs"]
    assert run["state"] == "finished" and run["rows"] == 32
