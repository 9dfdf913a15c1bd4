"""The complete self-test, and its report."""

from __future__ import annotations

import json

import pytest

from deltaw.selftest import run
from deltaw.selftest.check import Check
from deltaw.selftest.run import SelfTest
from tests.cli.conftest import start
from tests.kernels.conftest import compiled_only


@pytest.mark.slow
@compiled_only
def test_this_installation_passes(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    process = start("doctor", "--self-test", "--json")
    out, _ = process.communicate(timeout=400)
    result = json.loads(out)
    assert process.returncode == 0 and result["passed"], [c for c in result["checks"] if not c["passed"]]
    checks = {check["name"]: check["what"] for check in result["checks"]}
    assert "equal to the bit" in checks["kill and resume"]
    assert "Nine tall ships left the harbor" in checks["decoding"]
    assert any(line.startswith("processor: ") for line in result["machine"])


def test_report_names_failing_checks_and_hides_nothing(monkeypatch):
    monkeypatch.setattr(run, "check_builds", lambda: [Check("build of x", note="sources 1")])
    monkeypatch.setattr(run, "check_threads", lambda expected: [Check("threads of x", "kernels run on 1 threads")])

    def fail(threads):
        yield Check("results of x", note="2 calls")
        raise RuntimeError("segment")

    monkeypatch.setattr(run, "check_results", fail)
    monkeypatch.setattr(run, "check_training", lambda folder, log: [Check("training", note="12 losses")])
    result = run.run_self_test()
    text = result.as_text()
    assert not result.passed and text.endswith("FAIL: threads of x, results of the kernels")
    assert "FAIL  results of the kernels: RuntimeError: segment" in text and "ok    results of x: 2 calls" in text
    assert "processor: " in text and "torch " in text
    assert SelfTest([Check("a")]).as_text().endswith("PASS")
