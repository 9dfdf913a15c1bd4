"""Studies whose worker is in this process, so that a test does not wait for one to start."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deltaw.experiments.worker import Trial, Worker
from deltaw.settings import RunConfig
from deltaw.training.callbacks import silent
from tests.conftest import COLORS, Settings, laid_over, write_rows


class WorkerHere(contextlib.AbstractContextManager):
    """Stands for :class:`deltaw.experiments.jobs.Child`; remembers what it was asked."""

    asked: list[str] = []  # noqa: RUF012 - shared on purpose: of all workers of a test

    def __init__(self, log: Path) -> None:
        self._told: Callable[[Mapping[str, object]], bool] | None = None
        self._worker = Worker(self._report, silent)

    def _report(self, message: Mapping[str, object]) -> bool:
        return self._told is None or self._told(message)

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


def made_up(request: Mapping[str, Any]) -> dict[str, object]:
    """An answer that follows from the settings alone: the loss is lowest at a rate of 1e-3."""
    config, do = request["config"], request["do"]
    train = config["train"]
    rate = request.get("rate", train["learning_rate"])
    loss = 0.1 + train["seed"] / 100 + (0.0 if rate == "auto" else abs(math.log(rate / 1e-3)))
    right = (len(config["method"]) + train["seed"]) % 8
    score = {"metric": "exact_match", "value": right / 8, "interval": [0.0, 1.0]}
    scored = {"eval": None, "score": score, "higher_is_better": True, "one_answer": None, "constant": None}
    scored["per_row"] = [float(n < right) for n in range(8)]
    if do == "run":
        Path(config["output"]).mkdir(parents=True, exist_ok=True)
        costs = {"trained_parameters": 100, "total_parameters": 1000, "adapter_bytes": 400, "training_rows": 20}
        steps = {"steps": 6, "best_step": 4, "seconds": 1.0, "validation": [[0, 9.0], [4, loss]], "flattened": False}
        return {**scored, **costs, **steps, "validation_loss": loss}
    if do == "trial":
        return {"training_rows": 20, "validation_rows": 2, "steps": math.ceil(3 * train["epochs"]), "loss": loss}
    return {"usual": {"usual_rate": 1e-3}, "rate": {"loss": loss, "steps": 2}, "base": scored}[do]


def use_made_up_answers(patch: pytest.MonkeyPatch) -> type[WorkerHere]:
    """Let studies train nothing: for tests of what is asked for, stored and gone on with."""
    patch.setattr(Worker, "answer", lambda self, request: made_up(request))
    return use_worker_here(patch)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> type[WorkerHere]:
    return use_made_up_answers(monkeypatch)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[WorkerHere]:
    return use_worker_here(monkeypatch)


@pytest.fixture
def meddling(untrained: type[WorkerHere]) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """While open, a function sees each request with its settings first: it may raise, or answer itself."""

    @contextlib.contextmanager
    def during(see: Callable[[str, Mapping[str, Any]], object]) -> Iterator[None]:
        answer = untrained.ask

        def ask(self: WorkerHere, do: str, *told: Any, **request: Any) -> Any:
            found = see(do, request.get("config", {}))
            return answer(self, do, *told, **request) if found is None else found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(untrained, "ask", ask)
            yield
        untrained.asked = []

    return during


@pytest.fixture
def try_out(study_settings: Settings, tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    """Trials, which are closed behind the test."""
    made = []

    def make(**changes: object) -> Trial:
        made.append(Trial(RunConfig.read(study_settings(tmp_path, **changes))))
        return made[-1]

    yield make
    for trial in made:
        trial.close()


@pytest.fixture(scope="session")
def study_settings(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Forty rows, eight of them held out; no learning rate is set."""
    rows = [{"prompt": f"paint {x} {c}", "completion": c[0]} for x in ("it", "her", "him") for c in COLORS]
    file = write_rows(tmp_path_factory.mktemp("study") / "rows.jsonl", rows)

    def make(output: Path, **changes: object) -> dict:
        train, data = {"learning_rate": "auto", "batch_size": 8, "epochs": 2}, {"train": str(file), "eval": 8}
        return settings(output, **laid_over({"train": train, "data": data}, changes))

    return make
