"""Runs side by side: their results, the settings that differ, and their answers to the same prompts.

Shared by the terminal and the page; it draws nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from deltaw.reports.page.figure import Numbers
from deltaw.reports.recorded import RecordedRun
from deltaw.reports.wording import (
    count,
    duration,
    gigabytes,
    metric_name,
    metric_value,
    rate,
    short,
    shown,
    when,
)

# Settings that differ between any two runs and say nothing.
UNTOLD = ("output",)


def names_of(records: Sequence[RecordedRun]) -> list[str]:
    """A short name for each run, unique among them: as much of its path as it takes."""
    paths = [record.folder.resolve().parts for record in records]
    names = []
    for path in paths:
        for length in range(1, len(path) + 1):
            if sum(other[-length:] == path[-length:] for other in paths) == 1:
                break
        names.append(os.path.join(*path[-length:]))
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, 1)]


def result_rows(records: Sequence[RecordedRun]) -> Numbers:
    """One row a result, one column a run; rows that no run has are left out."""
    rows: list[tuple[str, list[str]]] = [
        ("state", [record.state for record in records]),
        ("model", [record.model for record in records]),
        ("method", [record.method for record in records]),
        ("steps", [f"{record.steps:,}" for record in records]),
    ]
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics.metric_names()))
    for name in metrics[:20]:
        last = [record.metrics.evaluated(name)[-1:] for record in records]
        rows.append(
            (f"held-out {metric_name(name)}", [metric_value(name, v[0][1]) if v else "" for v in last])
        )
    drift = [record.result.get("drift") for record in records]
    changes = [d.get("change") if isinstance(d, dict) else None for d in drift]
    rows += [
        ("drift, nats per token", ["" if c is None else f"{c:+.2f}" for c in changes]),
        ("training loss, mean", [_or_empty(record.result.get("train_loss"), short) for record in records]),
        ("training time", [duration(record.seconds) if record.seconds else "" for record in records]),
        ("rows a second", [_or_empty(record.rows_per_second, rate) for record in records]),
        ("tokens a second", [_or_empty(record.tokens_per_second, count) for record in records]),
        ("peak memory", [_or_empty(record.peak_bytes, gigabytes) for record in records]),
        ("planned memory", [_or_empty(record.planned_bytes, gigabytes) for record in records]),
        (
            "trained parameters",
            [_or_empty(record.result.get("trained_parameters"), count) for record in records],
        ),
        ("began", [when(record.started) for record in records]),
    ]
    kept = [(name, *cells) for name, cells in rows if any(cells)]
    return Numbers("Results of each run", ("result", *names_of(records)), kept)


def differing_settings(records: Sequence[RecordedRun]) -> Numbers:
    """The settings that are not the same in all runs, as they were set or chosen."""
    keys = dict.fromkeys(key for record in records for key in record.flat_settings)
    rows = []
    for key in keys:
        if key in UNTOLD:
            continue
        values = [shown(record.setting(key)) if key in record.flat_settings else "" for record in records]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return Numbers("Values by run", ("setting", *names_of(records)), rows)


def same_prompts(records: Sequence[RecordedRun], most: int = 8) -> list[dict[str, Any]]:
    """Prompts that at least two runs answered, with the last answer of each."""
    names = names_of(records)
    answers: dict[str, dict[str, Any]] = {}
    for name, record in zip(names, records, strict=True):
        for sample in sorted(record.metrics.samples, key=lambda sample: sample.step):
            entry = answers.setdefault(
                sample.prompt, {"expected": sample.expected, "row": sample.row, "of": {}}
            )
            entry["of"][name] = sample.answer
    found: list[dict[str, Any]] = []
    for prompt, entry in answers.items():
        if len(entry["of"]) > 1 and len(found) < most:
            name = f"Row {entry['row']}" if entry["row"] is not None else f"Prompt {len(found) + 1}"
            found.append(
                {
                    "name": name,
                    "prompt": prompt[:2000],
                    "expected": entry["expected"],
                    "answers": [(run, text[:2000] or "(nothing)") for run, text in entry["of"].items()],
                }
            )
    return found


def as_values(records: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """Each run as plain values, ready for JSON."""
    return [
        {
            "name": name,
            "folder": os.fspath(record.folder),
            "state": record.state,
            "model": record.model,
            "task": record.task,
            "method": record.method,
            "rows": int(record.metrics.total("rows")),
            "steps": record.steps,
            "total_steps": record.total_steps,
            "held_out_loss": record.held_out_loss,
            "score": None if record.score is None else {"metric": record.score[0], "value": record.score[1]},
            "eval": {
                metric: found[-1][1]
                for metric in record.metrics.metric_names()
                if (found := record.metrics.evaluated(metric))
            },
            "seconds": record.seconds,
            "rows_per_second": record.rows_per_second,
            "peak_memory_bytes": record.peak_bytes,
            "planned_memory_bytes": record.planned_bytes,
            "started": record.started,
            "changed": record.changed,
        }
        for name, record in zip(names_of(records), records, strict=True)
    ]


def _or_empty(value: Any, wording: Any) -> str:
    return "" if value is None else str(wording(value))
