"""An encoder and trained classifiers on disk, which tests of several files read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.encoder_models import train_classifier, write_bert


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("models") / "bert", matryoshka_dimensions=[8, 32])


@pytest.fixture(scope="session")
def runs(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {
        "mood": train_classifier(bert, folder / "mood", ("bad", "fine", "good")),
        "topic": train_classifier(bert, folder / "topic", ("art", "law"), lora={"rank": 4}),
        "prefix": train_classifier(bert, folder / "prefix", ("no", "yes"), method="prompt", prompt={"length": 3}),
    }
