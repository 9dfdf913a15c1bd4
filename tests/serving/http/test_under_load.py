"""The benchmark of the server under load: with a tiny model nothing is wrong or lost, and it sees what is."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_load_test_sees_what_is_wrong_or_lost(start, monkeypatch):
    import psutil

    from deltaw.serving.http.settings import Limits

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from serve_load import Case, LoadTest, growth, written_alone

    server = start("clerk", "poet", limits=Limits(queue=8))
    cases = [Case(model, text, 8) for model in ("base", "clerk", "poet") for text in ("hello", "how are you")]

    def counted(answers, **more):
        settings = {"requests": 40, "clients": 4, "process": psutil.Process(), **more}
        return asyncio.run(LoadTest(server.url, answers, {}, **settings).run())

    answers = asyncio.run(written_alone(server.url, cases))
    assert answers[cases[2]] == "clerk: H"
    good = counted(answers)
    assert good.right > 20 and good.cancelled > 0 and not good.wrong and not good.lost
    assert good.right + good.cancelled == 40 and good.first and growth(good.memory)[0] > 1
    wrong = counted(answers | {cases[2]: "poet: HE"})
    assert wrong.wrong and all("clerk" in line for line in wrong.wrong)
    lost = counted(answers | {Case("nobody", "hello", 5): "HELLO"})
    assert lost.lost and all("nobody" in line for line in lost.lost)
    slowly = {Case("base", "be slow", 40): ("be slow" * 20)[:40]}  # two seconds each
    flooded = counted(slowly, clients=40, cancel=0.0)
    assert any("429" in line for line in flooded.lost), "a refusal is a lost request"


@pytest.mark.slow
def test_answers_under_load_are_those_written_alone(packages):
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--model", "tiny", "--requests", "400"]
    command += ["--clients", "16", "--adapters", "5", "--prompts", "6", "--tokens", "12", "--threads", "1"]
    # Less than the eight adapters need, so that they leave memory and come back.
    command += ["--adapter-memory", "500KB", "--rival", "off"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (right|given up|wrong|lost)", done.stdout)}
    assert counts["right"] > 250 and counts["given up"] > 20
    assert counts["wrong"] == counts["lost"] == 0
    assert "guests loaded" in done.stdout and "99th percentile" in done.stdout
