"""The command line, called in this process, and in one of its own where signals and streams matter."""

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
from tests.conftest import laid_over


@dataclass(frozen=True)
class Ended:
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def unwrapped(self) -> str:
        """The errors on one line, whose lines break at 80 columns."""
        return " ".join(self.err.split())


Call = Callable[..., Ended]


def assert_refused(ended: Ended, *words: object) -> None:
    """The command ended with one message, which has these words."""
    assert ended.status == 2 and "Traceback" not in ended.err, ended
    assert len(re.findall("^error: ", ended.err, re.MULTILINE | re.IGNORECASE)) == 1, ended.err
    for word in words:
        assert str(word) in ended.err or str(word) in ended.unwrapped, ended.err


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Call ``deltaw`` with arguments, in this process; anything but an exit is an error of the test, and so is
    another status than the one that is given."""

    def run(*arguments: object, stdin: str = "", status: int | None = None) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        found = Ended(int(ended.value.code or 0), *capsys.readouterr())
        assert status in (None, found.status), found
        return found

    return run


@pytest.fixture
def flags(model_folder: Path, rows_file: Path) -> Callable[..., list[str]]:
    """The flags of a short training run into ``output``."""

    def make(output: Path, **instead: object) -> list[str]:
        given = {"model": model_folder, "data": rows_file, "output": output, "precision": "fp32", "threads": 1}
        given |= {"train.batch_size": 5, **{key.replace("__", "."): value for key, value in instead.items()}}
        return [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]

    return make


def start(*arguments: object, env: Mapping[str, str] | None = None) -> processes.Process:
    """``deltaw`` in a process of its own, its streams kept apart; it is killed where a ``with`` block ends."""
    return processes.start("-m", "deltaw", *arguments, env=env)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def changed(file: Path, **changes: object) -> None:
    """Lay other values over those of a JSON or YAML file."""
    read, write = (yaml.safe_load, yaml.safe_dump) if file.suffix == ".yaml" else (json.loads, json.dumps)
    file.write_text(write(laid_over(read(file.read_text()), changes)))
