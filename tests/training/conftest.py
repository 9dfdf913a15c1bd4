"""Fixtures of runs over several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Settings, laid_over, write_rows


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Eleven rows of 8 to 70 tokens, most of which begin alike, and four others to evaluate on."""
    folder = tmp_path_factory.mktemp("uneven")
    rows = [{"prompt": f"say {'very ' * (n % 4)}{n}", "completion": "word " * (1 + 5 * n % 9)} for n in range(15)]
    return write_rows(folder / "train.jsonl", rows[:11]), write_rows(folder / "eval.jsonl", rows[11:])


@pytest.fixture
def of(settings: Settings, uneven: tuple[Path, Path]) -> Callable[..., dict]:
    """Settings of a run on the uneven rows, with a checkpoint after each step."""

    def make(output: Path, **changes: object) -> dict:
        data = {"train": str(uneven[0]), "eval": str(uneven[1])}
        train = {"batch_size": 5, "epochs": 2, "eval_every": 2, "checkpoint_every": 1, "samples": 1}
        return settings(output, **laid_over({"data": data, "train": train}, changes))

    return make
