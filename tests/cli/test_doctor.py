"""`deltaw doctor`: text and one object, and what it refuses."""

from __future__ import annotations

import json

from tests.cli.conftest import assert_refused, start


def test_one_object_without_compiled_kernels(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("DELTAW_NATIVE", "0")
    monkeypatch.setenv("DELTAW_KERNEL", "avx2")  # misspelled
    process = start("doctor", "--output", tmp_path / "runs", "--model", model_folder, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    told = json.loads(out)
    keys = "deltaw status processor kernels memory disks packages optional gpus environment model findings versions"
    assert told.keys() >= set(keys.split())
    assert told["model"]["reference"] == str(model_folder)
    assert told["environment"]["DELTAW_NATIVE"] == "0"
    findings = told["findings"]
    assert {f["severity"] for f in findings} <= {"ok", "note", "warning"}
    assert any("DELTAW_KERNEL " in f["what"] and "DELTAW_KERNELS" in f["hint"] for f in findings)
    assert any("switched off" in f["what"] for f in findings)
    assert told["kernels"]["chosen"]["kernels"] == "none"
    assert told["kernels"]["rates"]["fp32"].keys() == {"torch"}


def test_a_report_leaves_nothing_behind(call, tmp_path):
    ended = call("doctor", "--output", tmp_path / "runs")
    assert ended.status == 0 and "products by" in ended.out and "training works" in ended.out
    assert "switched off" not in ended.out
    assert not (tmp_path / "runs").exists()


def test_what_makes_training_impossible_has_status_2_and_still_one_object(call, tmp_path):
    (tmp_path / "file").write_text("kept")
    ended = call("doctor", "--output", tmp_path / "file" / "runs", "--json")
    assert ended.status == 2
    told = json.loads(ended.out)
    assert told["status"] == "problem"
    (problem,) = [f for f in told["findings"] if f["severity"] == "problem"]
    assert str(tmp_path / "file") in problem["what"]


def test_kernels_that_are_not_known_are_refused(call, monkeypatch):
    monkeypatch.setenv("DELTAW_KERNELS", "avx1024")
    assert_refused(call("doctor"), "avx1024")
