"""`deltaw runs` lists and compares runs, including incomplete ones and those of older versions."""

from __future__ import annotations

import json
import shutil

import pytest

from deltaw.runs.folder import RunLock
from tests.cli.conftest import assert_refused, update_file
from tests.reports.html_pages import Page
from tests.reports.run_folders import write_factors, write_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder whose `runs` contains runs of every state."""
    monkeypatch.chdir(tmp_path)
    write_factors(write_run(tmp_path / "runs" / "one"))
    other_settings = {"lora": {"rank": 64, "alpha": 8.0}}
    write_run(tmp_path / "runs" / "sweep" / "two", state="interrupted", settings=other_settings, seed=1)
    write_run(tmp_path / "runs" / "broken", state="failed", steps=3)
    write_run(tmp_path / "runs" / "old", state=None)
    (tmp_path / "runs" / "not a run").mkdir()
    return tmp_path


def test_runs_lists_runs_with_state(call, folder):
    result = call("runs")
    assert result.status == 0 and result.err == ""
    lines = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    for name, state in {"one": "finished", "two": "interrupted", "broken": "failed", "old": "unknown"}.items():
        assert state in lines[name], name
    assert "exact match 80.0%" in lines["one"] and "not a run" not in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 80
    assert "a wider terminal also shows" in result.out
    assert call("runs", folder / "runs").out == result.out
    assert {"one", "two"} & set(call("runs", "sweep").out.split()) == {"two"}


def test_runs_json_has_state_and_metrics(call, folder):
    output = json.loads(call("runs", "--json").out)
    runs = {run["name"]: run for run in output["runs"]}
    assert runs.keys() == {"one", "two", "broken", "old"}
    first_run = runs["one"]
    assert first_run["state"] == "finished" and first_run["steps"] == first_run["total_steps"] == 60
    assert first_run["rows"] == 960
    assert first_run["score"] == {"metric": "exact_match", "value": 0.8}
    assert first_run["peak_memory_bytes"] == 1_010_000_000 and 0.4 < first_run["held_out_loss"] < 0.6
    assert runs["old"]["peak_memory_bytes"] is None and runs["two"]["total_steps"] == 120


def test_runs_reports_reason_of_failure(call, folder):
    update_file(folder / "runs" / "broken" / "run.json", error={"what": "the disk is full\n  in /tmp", "where": "/tmp"})
    killed_run = write_run(folder / "runs" / "gone", state="running", steps=3)
    # The process ran on another host, so only the lock shows if the run is alive.
    update_file(killed_run / "run.json", process={"host": "elsewhere", "id": 1, "begun": 0.0})
    result = call("runs", status=0)
    assert "broken: the disk is full\n" in result.out and "gone: its process is gone" in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 80 and "…  " not in result.out
    runs = {run["name"]: run for run in json.loads(call("runs", "--json").out)["runs"]}
    assert runs["broken"]["error"]["where"] == "/tmp" and runs["broken"]["reason"] == "the disk is full"
    assert runs["gone"]["state"] == "killed" and runs["one"]["reason"] is runs["one"]["error"] is None
    assert "Ctrl-C" in runs["two"]["reason"]
    lock = RunLock(killed_run)
    assert [run["state"] for run in json.loads(call("runs", killed_run, "--json").out)["runs"]] == ["running"]
    lock.release()


def test_two_runs_are_compared_in_terminal_and_page(call, folder):
    result = call("runs", "one", folder / "runs" / "sweep" / "two", "--output", "page.html", status=0)
    (rank,) = [line for line in result.out.splitlines() if line.startswith("lora.rank")]
    assert rank.split() == ["lora.rank", "4", "64"]
    assert "lora.alpha" not in result.out and "held-out exact match" in result.out
    page = Page((folder / "page.html").read_text())
    assert page.faults == [] and "2 runs compared" in page.text
    assert max(len(line) for line in result.out.splitlines()) <= 80


def test_report_is_rewritten_on_request(call, folder):
    assert not (folder / "runs" / "one" / "report.html").exists()
    result = call("runs", "one", "--report")
    assert result.status == 0 and "report.html" in result.out
    assert Page((folder / "runs" / "one" / "report.html").read_text()).faults == []


def test_unknown_run_is_rejected_with_suggestion(call, folder):
    assert_refused(call("runs", "onne"), "did you mean 'one'")
    assert_refused(call("runs", "one", "--output", "page.html"), "two")
    path_inside_file = folder / "runs" / "one" / "run.yaml" / "page.html"
    assert_refused(call("runs", "one", "old", "--output", path_inside_file), "cannot write")
    shutil.rmtree(folder / "runs")
    result = call("runs")
    assert result.status == 0 and "no runs in runs" in result.out


def test_finished_run_is_listed(call, finished_run):
    (run,) = json.loads(call("runs", finished_run, "--json").out)["runs"]
    assert run["state"] == "finished" and run["rows"] == 32
