"""Runs side by side: their results, the settings that differ, and their answers to the same prompts.

Shared by the terminal and the page; it draws nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from deltaw.errors import UserError, did_you_mean
from deltaw.experiments.comparison import or_empty
from deltaw.reports.page.svg import Numbers, smoothed
from deltaw.reports.tables import add_row, one_line, table
from deltaw.reports.wording import count, duration, gigabytes, metric_name, metric_value, rate, short, shown, when
from deltaw.runs.folder import (
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    RUNNING,
    Run,
    find_runs,
    is_run,
    mapping,
    read_run,
)

# Where runs are by default.
FOLDER = "runs"


@dataclass(frozen=True)
class Chosen:
    """Runs, and whether they are to be compared rather than listed. where: the folder, for a message."""

    records: list[Run]
    compared: bool
    where: str


def choose_runs(names: Sequence[str]) -> Chosen:
    """The runs that ``names`` means.

    Nothing: all below ``runs``. Folders of runs are listed; two or more runs are compared.

    Raises:
        UserError: a name is neither a run nor a folder.
    """
    there = Path(FOLDER)
    if not names:
        return Chosen([read_run(path) for path in find_runs(there)] if there.exists() else [], False, FOLDER)
    places = [place_of(name) for name in names]
    found = [run for path in places for run in ([path] if is_run(path) else find_runs(path))]
    listed = not all(map(is_run, places))
    distinct = list({path.resolve(): path for path in found}.values())
    return Chosen([read_run(path) for path in distinct], not listed and len(distinct) > 1, ", ".join(names))


def place_of(name: str) -> Path:
    """The folder that a name means.

    Raises:
        UserError: there is none.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    below = Path(FOLDER) / name
    if below.is_dir():
        return below
    there = Path(FOLDER)
    known = [os.path.relpath(run, there) for run in find_runs(there)] if there.is_dir() else []
    hint = did_you_mean(name, known) if known else "give the path of a run's folder"
    raise UserError(f"'{name}' is neither a run nor a folder of runs", where="the runs to list", hint=hint)


def names_of(records: Sequence[Run]) -> list[str]:
    """A short name for each run, unique among them: as much of its path as it takes."""
    paths = [record.path.resolve().parts for record in records]
    names = []
    for path in paths:
        for length in range(1, len(path) + 1):
            if sum(other[-length:] == path[-length:] for other in paths) == 1:
                break
        names.append(os.path.join(*path[-length:]))
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, 1)]


def result_rows(records: Sequence[Run]) -> Numbers:
    """One row a result, one column a run; rows that no run has are left out."""
    rows: list[tuple[str, list[str]]] = [
        *((name, [getattr(record, name) for record in records]) for name in ("state", "model", "method")),
        ("steps", [f"{record.steps:,}" for record in records]),
    ]
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics.metric_names()))
    for name in metrics[:20]:
        last = [record.metrics.evaluated(name)[-1:] for record in records]
        if any(name == (record.score or ("",))[0] for record in records):
            base = [metric_value(name, record.base[name]) if name in record.base else "" for record in records]
            rows.append((f"{metric_name(name)} before training", base))
        rows.append((f"held-out {metric_name(name)}", [metric_value(name, v[0][1]) if v else "" for v in last]))
    ends = [record.metrics.column("reward")[1] for record in records]
    rows.append(("training reward, mean of the last steps", [short(smoothed(e)[-1]) if len(e) else "" for e in ends]))
    verdicts = [str(mapping(record.result.get("generation")).get("verdict") or "") for record in records]
    rows.append(("generation", verdicts))
    changes = [mapping(record.result.get("drift")).get("change") for record in records]
    rows += [
        ("drift, nats per token", [or_empty(change, "{:+.2f}".format) for change in changes]),
        ("training loss, mean", [or_empty(record.result.get("train_loss"), short) for record in records]),
        ("training time", [or_empty(record.seconds or None, duration) for record in records]),
        ("rows a second", [or_empty(record.rows_per_second, rate) for record in records]),
        ("tokens a second", [or_empty(record.tokens_per_second, count) for record in records]),
        ("peak memory", [or_empty(record.peak_bytes, gigabytes) for record in records]),
        ("planned memory", [or_empty(record.planned_bytes, gigabytes) for record in records]),
        ("trained parameters", [or_empty(record.result.get("trained_parameters"), count) for record in records]),
        ("began", [when(record.started) for record in records]),
    ]
    kept = [(name, *cells) for name, cells in rows if any(cells)]
    return Numbers("Results of each run", ("result", *names_of(records)), kept)


def differing_settings(records: Sequence[Run]) -> Numbers:
    """The settings that are not the same in all runs, as they were set or chosen."""
    rows = []
    for key in dict.fromkeys(key for record in records for key in record.flat_settings if key != "output"):
        values = [shown(record.setting(key)) if key in record.flat_settings else "" for record in records]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return Numbers("Values by run", ("setting", *names_of(records)), rows)


def same_prompts(records: Sequence[Run], most: int = 8) -> list[dict[str, Any]]:
    """Prompts that at least two runs answered, with the last answer of each."""
    names = names_of(records)
    answers: dict[str, dict[str, Any]] = {}
    for name, record in zip(names, records, strict=True):
        for sample in sorted(record.metrics.samples, key=lambda sample: sample.step):
            entry = answers.setdefault(sample.prompt, {"expected": sample.expected, "row": sample.row, "of": {}})
            entry["of"][name] = sample.answer
    shared = [(prompt, entry) for prompt, entry in answers.items() if len(entry["of"]) > 1]
    return [
        {
            "name": f"Row {entry['row']}" if entry["row"] is not None else f"Prompt {number}",
            "prompt": prompt[:2000],
            "expected": entry["expected"],
            "answers": [(run, text[:2000] or "(nothing)") for run, text in entry["of"].items()],
        }
        for number, (prompt, entry) in enumerate(shared[:most], 1)
    ]


# What JSON gives under the name that a record has it by.
_SAME = (
    *("state", "reason", "model", "task", "method", "steps", "total_steps"),
    *("seconds", "rows_per_second", "started", "changed"),
)


def as_values(records: Sequence[Run]) -> list[dict[str, Any]]:
    """Each run as plain values, ready for JSON."""
    return [
        {
            "name": name,
            "folder": os.fspath(record.path),
            "rows": int(record.metrics.total("rows")),
            "held_out_loss": record.held_out_losses[-1][1] if record.held_out_losses else None,
            "score": None if record.score is None else dict(zip(("metric", "value"), record.score, strict=True)),
            "eval": {
                name: found[-1][1]
                for name in record.metrics.metric_names()
                if (found := record.metrics.evaluated(name))
            },
            "peak_memory_bytes": record.peak_bytes,
            "planned_memory_bytes": record.planned_bytes,
            "error": dict(record.part("error")) or None,
            **{key: getattr(record, key) for key in _SAME},
        }
        for name, record in zip(names_of(records), records, strict=True)
    ]


STYLES = {FINISHED: "green", RUNNING: "cyan", INTERRUPTED: "yellow"}
# The longest cell of a column of names, and what lies between two columns.
NAME, MODEL, GAP = 34, 26, 3


@dataclass(frozen=True)
class Column:
    """One column of the list.

    Attributes:
        title: its head. text: of a run. importance: 0 always stays; the highest goes first.
        right: numbers stand at the right.
    """

    title: str
    text: Callable[[Run], str]
    importance: int
    right: bool = True


def _steps(record: Run) -> str:
    total = record.total_steps
    return f"{record.steps:,}" if total in (None, record.steps) else f"{record.steps:,}/{total:,}"


def _score(record: Run) -> str:
    score = record.score
    if score is None or score[0] == record.loss_metric:
        return ""
    return f"{metric_name(score[0])} {metric_value(*score)}"


def _model(record: Run) -> str:
    reference = record.model.rstrip("/")
    last = reference if reference.startswith("pypi:") else reference.rpartition("/")[2]
    return one_line(last.removeprefix("pypi:"), MODEL, end=True)


COLUMNS = (
    Column("model", _model, 8, right=False),
    Column("method", lambda record: record.method, 3, right=False),
    Column("rows", lambda record: count(record.metrics.total("rows")), 7),
    Column("steps", _steps, 5),
    Column("state", lambda record: record.state, 0, right=False),
    Column("held-out", lambda record: short(record.held_out_losses[-1][1]) if record.held_out_losses else "", 1),
    Column("score", _score, 2),
    Column("time", lambda record: or_empty(record.seconds or None, duration), 4),
    Column("memory", lambda record: or_empty(record.peak_bytes and record.peak_bytes / 1e9, "{:.2f} GB".format), 6),
    Column("when", lambda record: when(record.started, short=True), 9),
)


def runs_table(records: Sequence[Run], width: int, columns: Sequence[Column] = COLUMNS) -> RenderableType:
    """One line a run, the latest last, in at most ``width`` characters where that can be; below, why runs failed."""
    every = columns
    records = sorted(records, key=lambda record: record.started)
    names = [one_line(name, NAME, end=True) for name in names_of(records)]
    cells = {column.title: [column.text(record) for record in records] for column in every}
    columns = [column for column in every if any(cells[column.title])]
    while True:
        needed = _width("run", names) + sum(_width(c.title, cells[c.title]) for c in columns)
        if needed - GAP <= width or all(column.importance == 0 for column in columns):
            break
        last = max(column.importance for column in columns)
        columns = [column for column in columns if column.importance != last]
    made = table(["run", *(column.title for column in columns)])
    for column, shown_column in zip(columns, made.columns[1:], strict=True):
        shown_column.justify = "right" if column.right else "left"
    for place, (name, record) in enumerate(zip(names, records, strict=True)):
        state = Text(record.state, STYLES.get(record.state, "red"))
        add_row(made, [name, *(state if c.title == "state" else cells[c.title][place] for c in columns)])
    failed = [(name, run) for name, run in zip(names, records, strict=True) if run.state in (FAILED, DIVERGED, KILLED)]
    notes = [Text(one_line(f"{name}: {run.reason}", width), "red") for name, run in failed if run.reason]
    left_out = [column.title for column in every if any(cells[column.title]) and column not in columns]
    if left_out:
        notes.append(Text(f"a wider terminal also shows {', '.join(left_out)}; --json has everything", style="dim"))
    return Group(made, *notes)


def comparison_tables(records: Sequence[Run], width: int) -> list[RenderableType]:
    """Results and differing settings, one run a column; runs that do not fit are in further tables."""
    names = [one_line(name, NAME, end=True) for name in names_of(records)]
    longest = max(len(name) for name in names) + 3
    at_once = max(1, (width - 26) // max(14, longest))
    parts: list[RenderableType] = []
    results, differences = result_rows(records), differing_settings(records)
    for start in range(0, len(records), at_once):
        part = slice(start, start + at_once)
        for numbers, title in ((results, results.head[0]), (differences, "settings that differ")):
            if numbers.rows:
                rows = [(first, *cells[part]) for first, *cells in numbers.rows]
                parts.append(table([title, *names[part]], rows, fold=True))
    if not differences.rows:
        parts.append(Text("no setting differs, apart from the folder"))
    return parts


def _width(title: str, cells: Sequence[str]) -> int:
    return max(len(title), *(len(cell) for cell in cells)) + GAP
