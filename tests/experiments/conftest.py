"""Studies whose worker is in this process, so that a test does not wait for one to start."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from deltaw.experiments.worker import Worker
from deltaw.training.callbacks import silent
from tests.conftest import COLORS, Settings, write_rows


class WorkerHere:
    """Stands for :class:`deltaw.experiments.jobs.Child`; remembers what it was asked."""

    asked: list[str] = []  # noqa: RUF012 - shared on purpose: of all workers of a test

    def __init__(self, log: Path) -> None:
        self._told: Callable[[Mapping[str, object]], bool] | None = None
        self._worker = Worker(self._report, silent)

    def _report(self, message: Mapping[str, object]) -> bool:
        return self._told is None or self._told(message)

    def __enter__(self) -> WorkerHere:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def close(self) -> None:
        return None

    def ask(
        self, do: str, on_report: Callable[[Mapping[str, object]], bool] | None = None, **request: object
    ) -> dict[str, object]:
        config = request.get("config")
        of_method = isinstance(config, dict) and do in ("usual", "rate", "run")
        type(self).asked.append(f"{do} {config['method']}" if of_method else do)
        self._told = on_report
        plain = json.loads(json.dumps({"do": do, **request}))
        return json.loads(json.dumps(dict(self._worker.answer(plain)), allow_nan=False))


def use_worker_here(patch: pytest.MonkeyPatch) -> type[WorkerHere]:
    """Let studies work in this process."""
    WorkerHere.asked = []
    for module in ("compare", "tune", "jobs"):
        patch.setattr(f"deltaw.experiments.{module}.Child", WorkerHere)
    return WorkerHere


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[WorkerHere]:
    return use_worker_here(monkeypatch)


@pytest.fixture(scope="session")
def study_settings(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Forty rows, eight of them held out; no learning rate is set."""
    rows = [{"prompt": f"paint {x} {c}", "completion": c[0]} for x in ("it", "her", "him") for c in COLORS]
    file = write_rows(tmp_path_factory.mktemp("study") / "rows.jsonl", rows)

    def make(output: Path, **changes: object) -> dict:
        train = {"learning_rate": "auto", "batch_size": 8, "epochs": 2, **changes.pop("train", {})}
        data = {"train": str(file), "eval": 8, **changes.pop("data", {})}
        return settings(output, data=data, train=train, **changes)

    return make
