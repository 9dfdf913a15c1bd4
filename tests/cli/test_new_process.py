"""Commands in a new interpreter print only their own lines, and open no network connection for local files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Runs before the verb. From the first import on, connections and name lookups are recorded and rejected.
WATCHED = """
import json, socket, sys
attempts = []
def refuse(kind):
    def call(*args, **kwargs):
        attempts.append([kind, repr(args[-1])])
        raise OSError("there is no network")
    return call
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, refuse(name))
from deltaw.cli import main
status = None
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    status = end.code
print(json.dumps([status, attempts]), file=sys.stderr)
"""
# Variables that disable telemetry. They are removed, so that the defaults are tested.
OFF = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK", "DISABLE_TELEMETRY")


def run_watched(*arguments: object, stdin: str = "") -> tuple[str, list[str]]:
    """Run a command that must succeed without connections, and return its output and the lines of its errors."""
    environment = {name: value for name, value in os.environ.items() if name not in OFF}
    command = [sys.executable, "-c", WATCHED, json.dumps([str(argument) for argument in arguments])]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True, env=environment)
    *lines, watched = result.stderr.splitlines()
    assert json.loads(watched) == [0, []], lines
    return result.stdout, lines


def test_training_opens_no_connection_and_output_contains_no_foreign_lines(call, flags, tmp_path):
    """Libraries print no advice, progress bars or warnings to the streams."""
    arguments = flags(tmp_path / "run", train__checkpointing="true")
    out, lines = run_watched("train", *arguments, "--json")
    json.loads(out)
    assert not any(line.startswith("still ") for line in lines)
    first = lines[: next(number for number, line in enumerate(lines) if line.startswith("step 1/2"))]
    header = ("rows:", "memory:", "precision: fp32", "steps:", "output:")  # a long path has a line to itself
    warnings = (
        "1 held-out row is few",
        "2 steps are few",
        "precision: int8 would take about",
        "compiled kernels",
        "time: about",
    )
    assert sum(line.startswith(header) for line in first) == 5, first
    assert all(line.startswith((*header, *warnings, "  ")) for line in first)
    expected_starts = (
        *(*header, *warnings, "step 1/2", "step 2/2", "training: 9 rows, 2 steps in ", "training loss", "held-out "),
        *("time: ", "drift: ", "adapter:", "report:", "next:", "  "),
    )
    assert [line for line in lines if not line.startswith(expected_starts)] == []
    assert [line for line in lines if len(line) > 80 and str(tmp_path) not in line] == []

    output = call("train", "-v", *arguments, "--fresh", "--json", status=0).unwrapped
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for name in ("device: cpu", "threads: 1", "attention: sdpa", "kernels: ", "blocks: ", "14 adapted", "read as"):
        assert name in output and name not in " ".join(first)
    reported = [*record["notes"], *record["data"]["lines"]]
    reported += [f"{name}: {choice['value']} ({choice['why']})" for name, choice in record["chosen"].items()]
    assert [line for line in reported if " ".join(line.split()) not in output] == []
    stored = (tmp_path / "run" / "run.yaml").read_text()
    assert all(f"# {record['chosen'][name]['value']}" in stored for name in ("device", "precision", "threads"))
    assert "# kernels: " in stored and "# attention: " in stored


@pytest.mark.slow
def test_generate_in_subprocess_prints_no_warnings(finished_run):
    out, lines = run_watched("generate", finished_run, "--max-new-tokens", "2", stdin="paint it red\n")
    assert lines == [] and out


def test_connection_would_be_detected():
    program = WATCHED.replace("from deltaw.cli import main", "main = lambda _: socket.create_connection(('hub', 443))")
    result = subprocess.run([sys.executable, "-c", program, "[]"], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "there is no network" in result.stderr


@pytest.mark.parametrize(("variables", "disabled"), [({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")])
def test_telemetry_is_disabled_unless_the_user_enables_it(variables, disabled):
    program = """
from deltaw.cli import main
try:
    main([])
except SystemExit:
    from huggingface_hub import constants
    print(constants.HF_HUB_DISABLE_TELEMETRY)
"""
    environment = {name: value for name, value in os.environ.items() if name not in OFF}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **variables})
    assert result.stdout.split()[-1] == disabled
