"""``metrics.jsonl`` of a run, read into arrays: its steps, evaluations, sample answers and drift.

A file of 100,000 steps becomes a few megabytes of numbers. A line that is damaged, such as the last one of a
killed run, is counted and passed over; keys that are not known are ignored. It knows no folder and no figure.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

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
