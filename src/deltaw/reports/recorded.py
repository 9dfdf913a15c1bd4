"""A run as its folder tells it: settings, metrics, summary, and what became of it.

Everything that lists, compares or shows runs reads them here. Folders of earlier versions have no
``summary.json``; what only that file knows is then missing, and nothing else. It knows no terminal and no
page.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from deltaw.config import parse_yaml
from deltaw.contained import require_contained
from deltaw.errors import UserError
from deltaw.reports.metrics_file import Metrics, read_metrics
from deltaw.training import summary as summary_file
from deltaw.training.run_folder import METRICS, SETTINGS
from deltaw.training.summary import FAILED, FINISHED, INTERRUPTED, RUNNING, is_alive

# A run that was killed: its summary says that it runs, and its process is gone.
KILLED = "killed"
UNKNOWN = "unknown"
LEARNING_RATES = "learning_rate.json"
LOSSES = ("loss", "mse")


@dataclass(frozen=True)
class RecordedRun:
    """One run.

    Attributes:
        folder: of the run.
        settings: as in run.yaml. settings_text: that file; empty where there is none.
        summary: as in summary.json; empty where there is none.
        metrics: as in metrics.jsonl.
        learning_rates: of a search of the learning rate, where there was one.
        changed: when the run last wrote anything, in seconds since 1970.
    """

    folder: Path
    settings: Mapping[str, Any]
    settings_text: str
    summary: Mapping[str, Any]
    metrics: Metrics
    learning_rates: Any
    changed: float

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def model(self) -> str:
        return str(self.settings.get("model") or self.summary.get("model") or "unknown model")

    @property
    def method(self) -> str:
        return str(self.settings.get("method") or self.summary.get("method") or "unknown method")

    @property
    def task(self) -> str:
        return str(self.settings.get("task") or self.summary.get("task") or "causal-lm")

    @property
    def result(self) -> Mapping[str, Any]:
        """What the run came to; empty while it runs, and where it failed."""
        return _mapping(self.summary.get("result"))

    @property
    def plan(self) -> Mapping[str, Any]:
        return _mapping(self.summary.get("plan"))

    @property
    def data(self) -> Mapping[str, Any]:
        return _mapping(self.summary.get("data"))

    @cached_property
    def state(self) -> str:
        """``running``, ``finished``, ``interrupted``, ``failed``, ``killed``, or ``unknown``."""
        state = self.summary.get("state")
        if state == RUNNING:
            return KILLED if is_alive(_mapping(self.summary.get("process"))) is False else RUNNING
        if state in (FINISHED, INTERRUPTED, FAILED):
            return str(state)
        return self._state_without_summary()

    def _state_without_summary(self) -> str:
        """An earlier version wrote the model card last, and said in it where a run was interrupted."""
        card = _text(self.folder / "README.md")
        if card is None:
            return UNKNOWN
        return INTERRUPTED if "interrupted before its last step" in card else FINISHED

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return int(self.metrics.columns["step"][-1]) if len(self.metrics) else 0

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps planned."""
        total = self.summary.get("total_steps")
        return int(total) if isinstance(total, int) else None

    @property
    def seconds(self) -> float:
        """Of training, evaluations apart."""
        return self.metrics.total("seconds")

    @property
    def rows_per_second(self) -> float | None:
        return self.metrics.total("rows") / self.seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.metrics.total("tokens") / self.seconds if self.seconds else None

    @property
    def peak_bytes(self) -> int | None:
        return _whole(self.result.get("peak_memory_bytes"))

    @property
    def planned_bytes(self) -> int | None:
        planned = self.plan.get("peak_resident_bytes")
        return _whole(self.result.get("planned_memory_bytes") if planned is None else planned)

    @property
    def started(self) -> float:
        """When it began, in seconds since 1970; where nothing tells, when it last wrote anything."""
        begun = self.summary.get("started")
        return float(begun) if isinstance(begun, int | float) else self.changed

    @property
    def score(self) -> tuple[str, float] | None:
        """The metric that counts and its last value."""
        told = _mapping(self.result.get("score"))
        name, value = told.get("metric"), told.get("value")
        if isinstance(name, str) and isinstance(value, int | float):
            return name, float(value)
        names = self.metrics.metric_names()
        plain = [name for name in names if name.rpartition("/")[2] not in (*LOSSES, "perplexity")]
        for name in [*plain, *names]:
            if found := self.metrics.evaluated(name):
                return name, found[-1][1]
        return None

    @property
    def held_out_loss(self) -> float | None:
        """The last one."""
        name = self.loss_metric
        found = self.metrics.evaluated(name) if name else []
        return found[-1][1] if found else None

    @property
    def loss_metric(self) -> str | None:
        """The name of the held-out metric that is a loss, of several sets the first one's; None where none
        is."""
        names = self.metrics.metric_names()
        return next((n for loss in LOSSES for n in names if n.rpartition("/")[2] == loss), None)

    @property
    def error(self) -> Mapping[str, Any]:
        """Why a run failed; empty where it did not."""
        return _mapping(self.summary.get("error"))

    def setting(self, key: str) -> object:
        """A setting by its dotted key: what the run chose where it is ``auto``."""
        chosen = _mapping(_mapping(self.summary.get("chosen")).get(key))
        return chosen["value"] if "value" in chosen else self.flat_settings.get(key)

    @cached_property
    def flat_settings(self) -> dict[str, object]:
        """The settings as they were given, by dotted key."""
        flat: dict[str, object] = {}
        for key, value in self.settings.items():
            inner = value if isinstance(value, Mapping) else {"": value}
            flat |= {f"{key}.{name}".rstrip("."): entry for name, entry in inner.items()}
        return flat


def read_run(folder: str | os.PathLike[str]) -> RecordedRun:
    """Read a run's folder.

    Raises:
        UserError: the folder is not a run's, or a link in it leads out of it.
    """
    path = Path(folder)
    if not is_run(path):
        raise UserError(
            "this is not the folder of a run: it holds neither run.yaml nor metrics.jsonl",
            where=str(path),
            hint="give a run's folder; 'deltaw runs' lists those below a folder",
        )
    require_contained(path)
    text = _text(path / SETTINGS) or ""
    files = [path / name for name in (SETTINGS, METRICS, summary_file.NAME)]
    times = [file.stat().st_mtime for file in files if file.is_file()]
    return RecordedRun(
        folder=path,
        settings=_mapping(_yaml(text)),
        settings_text=text,
        summary=_mapping(_json(path / summary_file.NAME)),
        metrics=read_metrics(path / METRICS),
        learning_rates=_json(path / LEARNING_RATES),
        changed=max(times, default=0.0),
    )


def is_run(path: Path) -> bool:
    return (path / SETTINGS).is_file() or (path / METRICS).is_file()


def find_runs(folder: Path, depth: int = 3) -> list[Path]:
    """The runs below a folder, by name; those within a run's own folder are not looked for.

    Raises:
        UserError: the folder cannot be read.
    """
    if not folder.is_dir():
        raise UserError(
            "there is no such folder",
            where=str(folder),
            hint="name the folder that your runs are in: the one above a run's 'output'",
        )
    found: list[Path] = []
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"the folder cannot be read: {error.strerror or error}", where=str(folder)) from error
    for path in inner:
        if is_run(path):
            found.append(path)
        elif depth > 1 and os.access(path, os.R_OK | os.X_OK):
            found += find_runs(path, depth - 1)
    return found


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _json(path: Path) -> object:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _yaml(text: str) -> object:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(value: object) -> float | None:
    """A finite number; None for anything else."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def numbers(values: Sequence[object]) -> list[float]:
    """Those of a list that are finite numbers."""
    return [found for value in values if (found := number(value)) is not None]
