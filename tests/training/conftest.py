"""Fixtures of multi-process runs, and runs without a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deltaw.settings import registry
from tests.conftest import Settings, deep_merge, write_rows


@pytest.fixture(scope="module", autouse=True)
def _fast_runs() -> Iterator[None]:
    """Write no page for runs, which saves time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "default_callbacks", ())
        yield


@pytest.fixture(scope="module")
def uneven_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return files of 11 training and 4 evaluation rows of 8 to 70 tokens, most with a common beginning."""
    folder = tmp_path_factory.mktemp("uneven_rows")
    rows = [{"prompt": f"say {'very ' * (n % 4)}{n}", "completion": "word " * (1 + 5 * n % 9)} for n in range(15)]
    return write_rows(folder / "train.jsonl", rows[:11]), write_rows(folder / "eval.jsonl", rows[11:])


@pytest.fixture
def make_config(settings: Settings, uneven_rows: tuple[Path, Path]) -> Callable[..., dict]:
    """Return a factory of run settings on ``uneven_rows`` with a checkpoint after each step."""

    def make(output: Path, **changes: object) -> dict:
        data = {"train": str(uneven_rows[0]), "eval": str(uneven_rows[1])}
        train = {"batch_size": 5, "epochs": 2, "eval_every": 2, "checkpoint_every": 1, "samples": 1}
        return settings(output, **deep_merge({"data": data, "train": train}, changes))

    return make
