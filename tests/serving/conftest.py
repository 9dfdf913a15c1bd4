"""Fixtures for an encoder and trained classifiers on disk. Engines are closed after each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.encoder_models import train_classifier, write_bert
from tests.serving.engines import OPEN_ENGINES


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert", matryoshka_dimensions=[8, 32])


@pytest.fixture(scope="session")
def runs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    prompt = {"method": "prompt", "prompt": {"length": 3}}
    return {
        "mood": train_classifier(bert, folder / "mood", ("bad", "fine", "good")),
        "topic": train_classifier(bert, folder / "topic", ("art", "law"), lora={"rank": 4}),
        "prefix": train_classifier(bert, folder / "prefix", ("no", "yes"), **prompt),
    }


@pytest.fixture(autouse=True)
def _close_engines() -> Iterator[None]:
    yield
    while OPEN_ENGINES:
        OPEN_ENGINES.pop().close(drain=False)
