"""Planning and training on local files open no network connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def connections(*arguments: object) -> tuple[object, list]:
    environment = {name: value for name, value in os.environ.items() if name not in OFF}
    arguments_json = json.dumps([str(argument) for argument in arguments])
    command = [sys.executable, "-c", WATCHED, arguments_json]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    status, attempts = json.loads(result.stderr.splitlines()[-1])
    return status, attempts


@pytest.fixture
def flags(model_folder: Path, rows_file: Path, tmp_path: Path) -> list[object]:
    options = {"model": model_folder, "data": rows_file, "output": tmp_path / "run", "precision": "fp32", "threads": 1}
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def test_planning_and_training_open_no_connection(flags):
    assert connections("train", "--train.max_steps", 2, *flags) == (0, [])


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
