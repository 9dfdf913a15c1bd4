"""Studies with a worker in this process, which avoids the start of a subprocess."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deltaw.experiments.trial import Trial
from deltaw.experiments.worker import TrialWorker
from deltaw.progress import ignore_line
from deltaw.settings.config import RunConfig
from tests.conftest import COLORS, Settings, deep_merge, write_rows


class LocalWorker(contextlib.AbstractContextManager):
    """In-process replacement of :class:`deltaw.experiments.jobs.WorkerProcess` that records requests."""

    requests: list[str] = []  # noqa: RUF012 - shared on purpose: of all workers of a test

    def __init__(self, log: Path) -> None:
        self._on_report: Callable[[Mapping[str, object]], bool] | None = None
        self._worker = TrialWorker(self._report, ignore_line)

    def _report(self, message: Mapping[str, object]) -> bool:
        return self._on_report is None or self._on_report(message)

    def __exit__(self, *_: object) -> None:
        return None

    def close(self) -> None:
        return None

    def ask(
        self, kind: str, on_report: Callable[[Mapping[str, object]], bool] | None = None, **request: object
    ) -> dict[str, object]:
        config = request.get("config")
        is_method_request = isinstance(config, dict) and kind in ("usual", "rate", "run")
        type(self).requests.append(f"{kind} {config['method']}" if is_method_request else kind)
        self._on_report = on_report
        plain = json.loads(json.dumps({"do": kind, **request}))
        return json.loads(json.dumps(dict(self._worker.answer(plain)), allow_nan=False))


def use_local_worker(patch: pytest.MonkeyPatch) -> type[LocalWorker]:
    """Run studies in this process."""
    LocalWorker.requests = []
    for module in ("compare", "tune", "jobs"):
        patch.setattr(f"deltaw.experiments.{module}.WorkerProcess", LocalWorker)
    return LocalWorker


def synthetic_result(request: Mapping[str, Any]) -> dict[str, object]:
    """Return a result computed from the settings only. The loss is lowest at a learning rate of 1e-3."""
    config = request["config"]
    kind = request["do"]
    train = config["train"]
    rate = request.get("rate", train["learning_rate"])
    loss = 0.1 + train["seed"] / 100 + (0.0 if rate == "auto" else abs(math.log(rate / 1e-3)))
    num_correct = (len(config["method"]) + train["seed"]) % 8
    score = {"metric": "exact_match", "value": num_correct / 8, "interval": [0.0, 1.0]}
    scored = {"eval": None, "score": score, "higher_is_better": True, "single_answer": None, "constant": None}
    scored["per_row"] = [float(n < num_correct) for n in range(8)]
    if kind == "run":
        Path(config["output"]).mkdir(parents=True, exist_ok=True)
        costs = {"trained_parameters": 100, "total_parameters": 1000, "adapter_bytes": 400, "training_rows": 20}
        steps = {"steps": 6, "best_step": 4, "seconds": 1.0, "validation": [[0, 9.0], [4, loss]], "flattened": False}
        return {**scored, **costs, **steps, "validation_loss": loss}
    if kind == "trial":
        return {"training_rows": 20, "validation_rows": 2, "steps": math.ceil(3 * train["epochs"]), "loss": loss}
    return {"usual": {"usual_rate": 1e-3}, "rate": {"loss": loss, "steps": 2}, "base": scored}[kind]


def use_synthetic_results(patch: pytest.MonkeyPatch) -> type[LocalWorker]:
    """Skip training in studies, for tests of requests, storage and resuming."""
    patch.setattr(TrialWorker, "answer", lambda self, request: synthetic_result(request))
    return use_local_worker(patch)


@pytest.fixture
def synthetic_worker(monkeypatch: pytest.MonkeyPatch) -> type[LocalWorker]:
    return use_synthetic_results(monkeypatch)


@pytest.fixture
def local_worker(monkeypatch: pytest.MonkeyPatch) -> type[LocalWorker]:
    return use_local_worker(monkeypatch)


@pytest.fixture
def intercept_requests(synthetic_worker: type[LocalWorker]) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """Return a context manager in which ``handler`` sees each request first and may raise or reply."""

    @contextlib.contextmanager
    def intercept(handler: Callable[[str, Mapping[str, Any]], object]) -> Iterator[None]:
        answer = synthetic_worker.ask

        def ask(self: LocalWorker, kind: str, *arguments: Any, **request: Any) -> Any:
            reply = handler(kind, request.get("config", {}))
            return answer(self, kind, *arguments, **request) if reply is None else reply

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(synthetic_worker, "ask", ask)
            yield
        synthetic_worker.requests = []

    return intercept


@pytest.fixture
def make_trial(study_settings: Settings, tmp_path: Path) -> Iterator[Callable[..., Trial]]:
    """Return a factory of trials. They are closed after the test."""
    trials = []

    def make(**changes: object) -> Trial:
        trials.append(Trial(RunConfig.read(study_settings(tmp_path, **changes))))
        return trials[-1]

    yield make
    for trial in trials:
        trial.close()


@pytest.fixture(scope="session")
def study_settings(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Return a factory of settings with eight held-out rows of a file and an automatic learning rate."""
    rows = [{"prompt": f"paint {x} {c}", "completion": c[0]} for x in ("it", "her", "him") for c in COLORS]
    file = write_rows(tmp_path_factory.mktemp("study") / "rows.jsonl", rows)

    def make(output: Path, **changes: object) -> dict:
        train = {"learning_rate": "auto", "batch_size": 8, "epochs": 2}
        data = {"train": str(file), "eval": 8}
        return settings(output, **deep_merge({"train": train, "data": data}, changes))

    return make
