"""Fixtures that call the CLI in this process, or in a subprocess if signals and streams matter."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from deltaw.cli import main
from tests import processes
from tests.conftest import deep_merge


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    out: str
    err: str

    @property
    def unwrapped(self) -> str:
        """Standard error joined to one line, because messages wrap at 80 columns."""
        return " ".join(self.err.split())


Call = Callable[..., CommandResult]


def assert_refused(result: CommandResult, *words: object) -> None:
    """Assert that the command failed with exactly one error message, which contains these words."""
    assert result.status == 2 and "Traceback" not in result.err, result
    assert len(re.findall("^error: ", result.err, re.MULTILINE | re.IGNORECASE)) == 1, result.err
    for word in words:
        assert str(word) in result.err or str(word) in result.unwrapped, result.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call ``deltaw`` in this process. The test fails if the command does not exit, or exits with a status other than
    ``status``.
    """

    def run(*arguments: object, stdin: str = "", status: int | None = None) -> CommandResult:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in arguments])
        result = CommandResult(int(exit_info.value.code or 0), *capsys.readouterr())
        assert status in (None, result.status), result
        return result

    return run


@pytest.fixture
def flags(model_folder: Path, rows_file: Path) -> Callable[..., list[str]]:
    """Return a function that builds the flags of a short training run into ``output``."""

    def make(output: Path, **overrides: object) -> list[str]:
        values = {"model": model_folder, "data": rows_file, "output": output, "precision": "fp32", "threads": 1}
        values |= {"train.batch_size": 5, **{key.replace("__", "."): value for key, value in overrides.items()}}
        return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]

    return make


def start(*arguments: object, env: Mapping[str, str] | None = None) -> processes.Process:
    """Start ``deltaw`` in a subprocess with separate streams. Leaving the ``with`` block kills it."""
    return processes.start("-m", "deltaw", *arguments, env=env)


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder`` by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def update_file(file: Path, **overrides: object) -> None:
    """Merge values into a JSON or YAML file."""
    read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    file.write_text(write(deep_merge(read(file.read_text()), overrides)))
