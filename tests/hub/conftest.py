"""The tiny model and tokenizer from the tests of ``runtime``, and conversions in a forked process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.processes import run_forked
from tests.runtime.conftest import llama_folder, tokenizer

__all__ = ["llama_folder", "tokenizer"]


@pytest.fixture(scope="session", autouse=True)
def _run_conversions_in_fork() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("deltaw.hub.gguf.run_command", run_forked)
        yield
