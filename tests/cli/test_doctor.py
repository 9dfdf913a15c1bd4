"""`deltaw doctor` as text and JSON, and invalid settings."""

from __future__ import annotations

import json

from tests.cli.conftest import assert_refused, start


def test_json_report_without_compiled_kernels(tmp_path, monkeypatch, model_folder):
    monkeypatch.setenv("DELTAW_NATIVE", "0")
    monkeypatch.setenv("DELTAW_KERNEL", "avx2")  # misspelled
    monkeypatch.setenv("DELTAW_API_KEY", "sk-5EcReT")
    process = start("doctor", "--output", tmp_path / "runs", "--model", model_folder, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    output = json.loads(out)
    keys = "deltaw status processor kernels memory disks packages optional gpus environment model findings versions"
    assert output.keys() >= set(keys.split())
    assert output["model"]["reference"] == str(model_folder)
    assert output["environment"]["DELTAW_NATIVE"] == "0"
    assert "5EcReT" not in out and "DELTAW_API_KEY" in output["environment"]
    findings = output["findings"]
    assert {f["severity"] for f in findings} <= {"ok", "note", "warning"}
    assert any("DELTAW_KERNEL " in f["what"] and "DELTAW_KERNELS" in f["hint"] for f in findings)
    assert any("switched off" in f["what"] for f in findings)
    assert output["kernels"]["chosen"]["kernels"] == "none"
    assert output["kernels"]["rates"]["fp32"].keys() == {"torch"}


def test_doctor_leaves_no_files(call, tmp_path):
    result = call("doctor", "--output", tmp_path / "runs")
    assert result.status == 0 and "products by" in result.out and "training works" in result.out
    assert "switched off" not in result.out
    assert not (tmp_path / "runs").exists()


def test_blocking_problem_exits_with_2_and_valid_json(call, tmp_path):
    (tmp_path / "file").write_text("kept")
    result = call("doctor", "--output", tmp_path / "file" / "runs", "--json")
    assert result.status == 2
    output = json.loads(result.out)
    assert output["status"] == "problem"
    (problem,) = [f for f in output["findings"] if f["severity"] == "problem"]
    assert str(tmp_path / "file") in problem["what"]


def test_unknown_kernels_are_rejected(call, monkeypatch):
    monkeypatch.setenv("DELTAW_KERNELS", "avx1024")
    assert_refused(call("doctor"), "avx1024")


def test_self_test_has_no_other_flags(call):
    assert_refused(call("doctor", "--self-test", "--model", "x"), "--model has no effect on the self-test")
