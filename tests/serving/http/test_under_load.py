"""The benchmark of the server under load, with a tiny model: nothing wrong, nothing lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_answers_under_load_are_those_written_alone(packages):
    command = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--model", "tiny", "--requests", "400"]
    command += ["--clients", "16", "--adapters", "5", "--prompts", "6", "--tokens", "12", "--threads", "1"]
    # Less than the eight adapters need, so that they leave memory and come back.
    command += ["--adapter-memory", "500KB", "--rival", "off"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(
        command, env=os.environ | paths, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts = {
        name: int(number) for number, name in re.findall(r"(\d+) (right|given up|wrong|lost)", done.stdout)
    }
    assert counts["right"] > 250 and counts["given up"] > 20
    assert counts["wrong"] == counts["lost"] == 0
    assert "guests loaded" in done.stdout and "99th percentile" in done.stdout
