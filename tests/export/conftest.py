"""Fixtures of the export tests. GGUF files are converted in this process, which is faster than a child process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaw.hub.gguf import convert_in_process
from tests.cli.conftest import call  # noqa: F401


@pytest.fixture(scope="package", autouse=True)
def _convert_in_this_process() -> Iterator[None]:
    def convert(path: Path, dtype: str, into: Path, log: Callable[[str], None]) -> None:
        assert convert_in_process(str(path), dtype, str(into)) == 0

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("deltaw.hub.gguf._convert_in_child", convert)
        yield
