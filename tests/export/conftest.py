"""GGUF files are converted in this process: that another one does it is no part of what is tested here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaw.hub.gguf import convert_here


@pytest.fixture(scope="package", autouse=True)
def _converted_here() -> Iterator[None]:
    def convert(path: Path, dtype: str, into: Path, say: Callable[[str], None]) -> None:
        assert convert_here(str(path), dtype, str(into)) == 0

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("deltaw.hub.gguf._convert_in_child", convert)
        yield
