"""A run as its folder tells it: settings, metrics, summary, and what became of it.

Everything that lists, compares or shows runs reads them here. Folders of earlier versions have no
``summary.json``; what only that file knows is then missing, and nothing else. It knows no terminal and no
page.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from deltaw.contained import require_contained
from deltaw.errors import UserError
from deltaw.settings import parse_yaml
from deltaw.training import summary as summary_file
from deltaw.training.run_folder import METRICS, SETTINGS
from deltaw.training.summary import FAILED, FINISHED, INTERRUPTED, RUNNING, is_alive

# ---- ``metrics.jsonl`` of a run, read into arrays: its steps, evaluations, sample answers and drift.
#
# A file of 100,000 steps becomes a few megabytes of numbers. A line that is damaged, such as the last one of a
# killed run, is counted and passed over; keys that are not known are ignored. It knows no folder and no figure.


# What is kept of a step.
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "gradient_norm",
    "rows",
    "tokens",
    "label_tokens",
    "seconds",
    "general_loss",
)
# Lines of other kinds that are kept, the last of them: a file that grows without bound is still shown.
KEPT = 20_000


@dataclass(frozen=True)
class SampleAnswer:
    """One held-out prompt and what the model made of it after so many steps."""

    step: int
    row: int | None
    prompt: str
    expected: str | None
    answer: str


@dataclass
class Metrics:
    """What a run measured.

    Attributes:
        columns: by name of :data:`COLUMNS`, one number a step (nan where a line has none), in the order of
            the steps.
        evaluations: step and metrics by name, those of named sets as ``set/metric``.
        samples: the sample answers. drifts: step and its numbers. warnings: step and kind.
        skipped: steps whose loss or gradient was not finite, and that were left out.
        damaged: lines that could not be read.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    samples: list[SampleAnswer] = field(default_factory=list)
    drifts: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    skipped: int = 0
    damaged: int = 0

    def __len__(self) -> int:
        return len(self.columns["step"]) if self.columns else 0

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps that have a finite value of ``name``, and these values."""
        if not self.columns:
            return np.zeros(0), np.zeros(0)
        values = self.columns[name]
        there = np.isfinite(values)
        return self.columns["step"][there], values[there]

    def evaluated(self, metric: str) -> list[tuple[int, float]]:
        """Step and value of a metric of the held-out rows."""
        found = [(step, values[metric]) for step, values in self.evaluations if metric in values]
        return [(step, value) for step, value in found if math.isfinite(value)]

    def metric_names(self) -> list[str]:
        """Of all evaluations, in the order in which they first came."""
        return list(dict.fromkeys(name for _, values in self.evaluations for name in values))

    def total(self, name: str) -> float:
        """The sum of a column."""
        return float(np.nansum(self.columns[name])) if self.columns else 0.0


def read_metrics(path: Path) -> Metrics:
    """The file's content; empty where there is no file."""
    metrics = Metrics()
    columns = {name: array("d") for name in COLUMNS}
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                _read_line(line, columns, metrics)
    except OSError:
        metrics.damaged += path.exists()
    found = {name: np.frombuffer(values, dtype=np.float64) for name, values in columns.items() if len(values)}
    metrics.columns = _in_order(found)
    metrics.evaluations = _last_of_each(metrics.evaluations[-KEPT:])
    metrics.drifts = _last_of_each(metrics.drifts[-KEPT:])
    metrics.samples = metrics.samples[-KEPT:]
    metrics.warnings = metrics.warnings[-KEPT:]
    return metrics


def _read_line(line: str, columns: Mapping[str, array], metrics: Metrics) -> None:
    if not line.strip():
        return
    try:
        values = json.loads(line)
        step = int(values["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        metrics.damaged += 1
        return
    if "loss" in values:
        for name, column in columns.items():
            column.append(_number(values.get(name)))
    if isinstance(values.get("eval"), Mapping):
        metrics.evaluations.append((step, dict(_flat(values["eval"]))))
    if isinstance(values.get("drift"), Mapping):
        metrics.drifts.append((step, dict(_flat(values["drift"]))))
    warning = values.get("warning")
    if isinstance(warning, Mapping):
        metrics.warnings.append((step, str(warning.get("kind", ""))))
    metrics.skipped += "skipped" in values
    if isinstance(values.get("samples"), list):
        metrics.samples += [_sample(step, one) for one in values["samples"] if isinstance(one, Mapping)]


def _sample(step: int, values: Mapping[str, object]) -> SampleAnswer:
    row = values.get("row")
    expected = values.get("expected")
    return SampleAnswer(
        step,
        row if isinstance(row, int) else None,
        str(values.get("prompt", "")),
        None if expected is None else str(expected),
        str(values.get("answer", "")),
    )


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, float]]:
    """Numbers by name; those of a section as ``section/name``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float) or value is None:
            yield f"{prefix}{name}", _number(value)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _in_order(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The last line of each step, by step: a run that went on from a checkpoint may have steps twice."""
    if not columns or np.all(np.diff(columns["step"]) > 0):
        return columns
    steps = columns["step"][::-1]
    _, last = np.unique(steps, return_index=True)
    return {name: values[::-1][last] for name, values in columns.items()}


def _last_of_each(found: list[tuple[int, dict[str, float]]]) -> list[tuple[int, dict[str, float]]]:
    """One entry a step, later lines added to earlier ones, by step."""
    by_step: dict[int, dict[str, float]] = {}
    for step, values in found:
        by_step.setdefault(step, {}).update(values)
    return sorted(by_step.items())


# ---- recorded


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
