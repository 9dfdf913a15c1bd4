"""Tests of the server load benchmark: with a tiny model no answer is wrong or lost, and errors are detected."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_load_test_detects_wrong_and_lost_answers(start, monkeypatch):
    import psutil

    from deltaw.serving.http.settings import Limits

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from serve_load import Case, LoadTest, answer_sequentially, growth

    server = start("clerk", "poet", limits=Limits(queue=8))
    cases = [Case(model, text, 8) for model in ("base", "clerk", "poet") for text in ("hello", "how are you")]

    def run_load(answers, **overrides):
        settings = {"requests": 40, "clients": 4, "process": psutil.Process(), **overrides}
        return asyncio.run(LoadTest(server.url, answers, {}, **settings).run())

    answers = asyncio.run(answer_sequentially(server.url, cases))
    assert answers[cases[2]] == "clerk: H"
    correct = run_load(answers)
    assert correct.right > 20 and correct.cancelled > 0 and not correct.wrong and not correct.lost
    assert correct.right + correct.cancelled == 40 and correct.first and growth(correct.memory)[0] > 1
    wrong = run_load(answers | {cases[2]: "poet: HE"})
    assert wrong.wrong and all("clerk" in line for line in wrong.wrong)
    lost = run_load(answers | {Case("nobody", "hello", 5): "HELLO"})
    assert lost.lost and all("nobody" in line for line in lost.lost)
    slow_answers = {Case("base", "be slow", 40): ("be slow" * 20)[:40]}  # two seconds each
    flooded = run_load(slow_answers, clients=40, cancel=0.0)
    assert any("429" in line for line in flooded.lost), "a refusal is a lost request"


@pytest.mark.slow
def test_answers_under_load_match_sequential_answers(packages):
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--model", "tiny", "--requests", "400"]
    command += ["--clients", "16", "--adapters", "5", "--prompts", "6", "--tokens", "12", "--threads", "1"]
    # Less than the adapters need, so that they are evicted and reloaded.
    command += ["--adapter-memory", "500KB", "--rival", "off"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    process = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (right|canceled|wrong|lost)", process.stdout)}
    assert counts["right"] > 250 and counts["canceled"] > 20
    assert counts["wrong"] == counts["lost"] == 0
    assert "guests loaded" in process.stdout and "99th percentile" in process.stdout
