"""Nothing is reported to anybody: planning and training on files that are here open no connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Run before the verb: whatever would connect or look up a name is noted and refused, from the first import on.
WATCHED = """
import json, socket, sys
asked = []
def refuse(kind):
    def call(*given, **named):
        asked.append([kind, repr(given[-1])])
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
print(json.dumps([status, asked]), file=sys.stderr)
"""
# What a user has who never heard of telemetry: no variable that turns it off.
OFF = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK", "DISABLE_TELEMETRY")


def connections(*arguments: object) -> tuple[object, list]:
    environment = {name: value for name, value in os.environ.items() if name not in OFF}
    given = json.dumps([str(argument) for argument in arguments])
    command = [sys.executable, "-c", WATCHED, given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    status, asked = json.loads(done.stderr.splitlines()[-1])
    return status, asked


@pytest.fixture
def flags(model_folder: Path, rows_file: Path, tmp_path: Path) -> list[object]:
    given = {"model": model_folder, "data": rows_file, "output": tmp_path / "run", "precision": "fp32", "threads": 1}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


@pytest.mark.parametrize("verb", [["plan"], ["train", "--train.max_steps", 2]], ids=["plan", "train"])
def test_a_verb_opens_no_connection(verb, flags):
    assert connections(*verb, *flags) == (0, [])


def test_a_connection_would_be_seen():
    program = WATCHED.replace("from deltaw.cli import main", "main = lambda _: socket.create_connection(('hub', 443))")
    done = subprocess.run([sys.executable, "-c", program, "[]"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "there is no network" in done.stderr


@pytest.mark.parametrize(("given", "disabled"), [({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")])
def test_libraries_are_told_to_report_nothing_unless_the_user_says_otherwise(given, disabled):
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
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**environment, **given})
    assert done.stdout.split()[-1] == disabled
