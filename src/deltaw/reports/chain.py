"""Tables and page of a chain: the stages with their costs, and their scores on the same held-out rows."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from deltaw.atomic_files import write_text
from deltaw.experiments.chain import BASE, RESULTS_FILE, START, ChainResult, HeldOutScores, StageScore
from deltaw.reports.page.write import render
from deltaw.reports.svg import FigureTable
from deltaw.reports.tables import MISSING, count, duration, format_time, gigabytes, metric_name, metric_value, table
from deltaw.runs.folder import not_writable_error, or_empty
from deltaw.runs.summary import to_plain
from deltaw.settings.start import start_sources
from deltaw.training.evaluation.base import is_share, mean_interval

PAGE_FILE = "chain.html"


def stages_table(result: ChainResult) -> FigureTable:
    """Return a table with a row per stage: rows, steps, time, memory, and drift from the base model."""
    rows = []
    for stage in result.chain.stages:
        values: dict[str, Any] = result.results[stage.name].as_dict()
        drift = (values.get("drift") or {}).get("change")
        seconds = sum((values.get("seconds_by_part") or {}).values())
        start = stage.config.start_from
        parents = [] if start is None else [source.reference for source in start_sources(start)]
        names = [
            Path(reference).name if Path(reference).parent == result.chain.folder else reference
            for reference in parents
        ]
        cells = (", ".join(names) or MISSING, stage.config.task, count(values["steps"]), duration(seconds))
        memory = gigabytes(values["peak_memory_bytes"]) if values["peak_memory_bytes"] else MISSING
        rows.append((stage.name, *cells, memory, or_empty(drift, "{:+.2f}".format) or MISSING))
    note = "Drift is the change of the loss of general answers, in nats per token."
    return FigureTable("Stages", ("stage", "starts from", "task", "steps", "time", "memory", "drift"), rows, note)


def score_tables(result: ChainResult) -> list[FigureTable]:
    """Return a table of the scores on the held-out rows of each stage, with differences on the same rows."""
    return [_score_table(result, held_out) for held_out in result.held_out]


def _score_table(result: ChainResult, held_out: HeldOutScores) -> FigureTable:
    scores = held_out.scores
    first = next(iter(scores.values()), None)
    errors = "; ".join(f"{name}: {message}" for name, message in held_out.errors.items())
    if first is None:
        return FigureTable(f"No scores on the held-out rows of '{held_out.stage}'", ("model",), (), errors)
    parents = parents_of(result)
    rows = []
    has_loss = first.metric != "loss" and "loss" in first.metrics
    for model, score in scores.items():
        value = metric_value(score.metric, score.value)
        if score.interval is not None:
            value += f" ({' to '.join(metric_value(score.metric, bound).rstrip('%') for bound in score.interval)})"
        differences = [_difference(other, score) for other in (scores.get(BASE), scores.get(parents.get(model, "")))]
        loss = (metric_value("loss", score.metrics.get("loss")),) if has_loss else ()
        rows.append((model, value, *differences, *loss))
    relative = ", relative to the base model" if held_out.is_relative else ""
    caption = f"{metric_name(first.metric)} on the {held_out.rows:,} held-out rows of '{held_out.stage}'{relative}"
    head = ["model", metric_name(first.metric), "change from base", "from its parent", *(["loss"] if has_loss else [])]
    return FigureTable(caption[0].upper() + caption[1:], head, rows, errors)


def parents_of(result: ChainResult) -> dict[str, str]:
    """Return the model that each stage starts from by name, if it is a single one."""
    first = result.chain.stages[0]
    parents = {} if first.config.start_from is None else {first.name: START}
    return parents | {stage.name: stage.parents[0] for stage in result.chain.stages if len(stage.parents) == 1}


def warning_lines(result: ChainResult) -> list[str]:
    """Return a line for each stage that is worse than its parent on the rows of another stage."""
    lines = []
    for held_out in result.held_out:
        for name, parent in parents_of(result).items():
            after = held_out.scores.get(name)
            before = held_out.scores.get(parent)
            if name == held_out.stage or after is None or before is None or None in (after.value, before.value):
                continue
            change = (after.value or 0.0) - (before.value or 0.0)
            if (change < 0) == after.higher_is_better and change:
                metric = metric_name(after.metric)
                text = _difference(before, after)
                lines.append(f"'{name}' is worse than '{parent}' on the rows of '{held_out.stage}': {metric} {text}")
    return lines


def _difference(before: StageScore | None, after: StageScore) -> str:
    """Return the mean change of a score on the same rows with its 95% interval, or an empty text."""
    if before is None or before is after or before.per_row is None or after.per_row is None:
        return ""
    change = np.array(after.per_row) - np.array(before.per_row)
    share = is_share(after.metric.rpartition(" ")[2])  # without the name of the set
    bounds = mean_interval(change)
    factor = 100.0 if share else 1.0
    digits = ".1f" if share else ".3f"
    mean = float(change.mean())
    if bounds is None or not math.isfinite(mean) or bounds[0] == bounds[1]:  # all rows changed equally
        return f"{factor * mean:+{digits}}"
    return f"{factor * mean:+{digits}} ± {factor * (bounds[1] - mean):{digits}}"


def terminal_tables(result: ChainResult) -> list[tuple[str, Table]]:
    """Return the captions and tables for the terminal."""
    stages = stages_table(result)
    scores = score_tables(result)
    captions = [stages.caption, *(f"{part.caption}{part.note and f' ({part.note})'}" for part in scores)]
    return [(caption, table(t.head, t.rows, fold=True)) for caption, t in zip(captions, [stages, *scores], strict=True)]


def write_results(result: ChainResult) -> None:
    """Write ``chain.json`` and ``chain.html`` into the folder of the chain."""
    folder = result.chain.folder
    text = json.dumps(to_plain(result.as_dict()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    runs = [(stage.name, f"{stage.name}/report.html") for stage in result.chain.stages]
    view: dict[str, Any] = {
        "title": f"Chain: {folder.name}",
        "lead": " → ".join(stage.name for stage in result.chain.stages),
        "stages": stages_table(result),
        "warnings": warning_lines(result),
        "scores": [(entry.stage, _score_table(result, entry)) for entry in result.held_out],
        "runs": [(name, page) for name, page in runs if (folder / page).is_file()],
        "written": format_time(time.time()),
    }
    try:
        write_text(folder / RESULTS_FILE, text)
        write_text(folder / PAGE_FILE, render("chain.html", view))
    except OSError as error:
        raise not_writable_error(folder, error) from error
