"""Compare runs: results, differing settings and answers to the same prompts, for the terminal and the HTML page."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from deltaw.errors import UserError, did_you_mean
from deltaw.hub.app_stores import SCHEMES
from deltaw.reports.svg import FigureTable, running_mean
from deltaw.reports.tables import (
    add_row,
    count,
    duration,
    format_interval,
    format_time,
    format_value,
    gigabytes,
    metric_name,
    metric_value,
    one_line,
    rate,
    short,
    table,
)
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
    or_empty,
    read_run,
)

# Default folder of runs.
DEFAULT_FOLDER = "runs"


@dataclass(frozen=True)
class RunSelection:
    """Selected runs.

    Attributes:
        records: The runs.
        compared: True to compare them, False to list them.
        location: Folder or names of the selection, for messages.
    """

    records: list[Run]
    compared: bool
    location: str


def select_runs(names: Sequence[str]) -> RunSelection:
    """Return the runs with the given names, or all runs in the folder ``runs`` if no names are given.

    A folder of runs is listed. Two or more individual runs are compared.

    Raises:
        UserError: If a name is neither a run nor a folder.
    """
    folder = Path(DEFAULT_FOLDER)
    if not names:
        return RunSelection([read_run(p) for p in find_runs(folder)] if folder.exists() else [], False, DEFAULT_FOLDER)
    paths = [find_folder(name) for name in names]
    run_paths = [run for path in paths for run in ([path] if is_run(path) else find_runs(path))]
    has_folders = not all(map(is_run, paths))
    distinct = list({path.resolve(): path for path in run_paths}.values())
    return RunSelection([read_run(path) for path in distinct], not has_folders and len(distinct) > 1, ", ".join(names))


def find_folder(name: str) -> Path:
    """Return the folder with this path, or the folder with this name in ``runs``.

    Raises:
        UserError: If neither exists.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    below = Path(DEFAULT_FOLDER) / name
    if below.is_dir():
        return below
    root = Path(DEFAULT_FOLDER)
    run_names = [os.path.relpath(run, root) for run in find_runs(root)] if root.is_dir() else []
    hint = did_you_mean(name, run_names) if run_names else "give the path of a run's folder"
    raise UserError(f"'{name}' is neither a run nor a folder of runs", location="the runs to list", hint=hint)


def unique_names(records: Sequence[Run]) -> list[str]:
    """Return the shortest unique path suffix of each run. A number is appended to names that are not unique."""
    paths = [record.path.resolve().parts for record in records]
    names = []
    for path in paths:
        for length in range(1, len(path) + 1):
            if sum(other[-length:] == path[-length:] for other in paths) == 1:
                break
        names.append(os.path.join(*path[-length:]))
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, 1)]


def result_rows(records: Sequence[Run]) -> FigureTable:
    """Return a table with a row per result and a column per run, without rows that are empty for all runs."""
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
        scored = [record.score is not None and record.score[0] == name for record in records]
        intervals = [format_interval(name, r.score_interval) if s else "" for r, s in zip(records, scored, strict=True)]
        rows.append((f"held-out {metric_name(name)}, 95% interval", intervals))
    rewards = [record.metrics.column("reward")[1] for record in records]
    means = [short(running_mean(values)[-1]) if len(values) else "" for values in rewards]
    rows.append(("training reward, mean of the last steps", means))
    verdicts = [str(mapping(record.result.get("generation")).get("verdict") or "") for record in records]
    rows.append(("generation", verdicts))
    changes = [mapping(record.result.get("drift")).get("change") for record in records]
    rows += [
        ("drift, nats per token", [or_empty(change, "{:+.2f}".format) for change in changes]),
        ("training loss, mean", [or_empty(record.result.get("train_loss"), short) for record in records]),
        ("training time", [or_empty(record.seconds or None, duration) for record in records]),
        ("rows per second", [or_empty(record.rows_per_second, rate) for record in records]),
        ("tokens per second", [or_empty(record.tokens_per_second, count) for record in records]),
        ("peak memory", [or_empty(record.peak_bytes, gigabytes) for record in records]),
        ("planned memory", [or_empty(record.planned_bytes, gigabytes) for record in records]),
        ("trained parameters", [or_empty(record.result.get("trained_parameters"), count) for record in records]),
        ("started", [format_time(record.started) for record in records]),
    ]
    filled_rows = [(name, *cells) for name, cells in rows if any(cells)]
    return FigureTable("Results of each run", ("result", *unique_names(records)), filled_rows)


# Settings and counts that determine the rows of a run, in words.
_ROW_SETTINGS = {"task": "task", "data.train": "training file", "data.eval": "evaluation rows", "data.seed": "seed"}
_ROW_SETTINGS |= {"train.seed": "seed", "data.columns": "columns", "data.rows": "sample", "data.group": "group"}
_ROW_SETTINGS |= {"data.other_classes": "dropped classes", "data.duplicates": "duplicates"}
_ROW_COUNTS = {"rows_read": "rows of the file", "rows_kept": "training rows", "held_out": "held-out rows"}


def comparison_notes(records: Sequence[Run]) -> list[str]:
    """Return the reasons why scores of the runs cannot be compared directly: different rows or classes."""
    notes = []
    counts = [mapping(record.part("data").get("counts")) for record in records]
    settings = {key: {str(record.setting(key)) for record in records} for key in _ROW_SETTINGS}
    different = [_ROW_SETTINGS[key] for key, values in settings.items() if len(values) > 1]
    for name, text in _ROW_COUNTS.items():
        numbers = [str(count.get(name, "unknown")) for count in counts]
        if len(set(numbers)) > 1:
            different.append(f"{text} ({', '.join(numbers)})")
    if different:
        reasons = ", ".join(dict.fromkeys(different))
        notes.append(f"Scores cannot be compared directly, because the rows differ: {reasons}.")
    classes = [tuple(mapping(count.get("class_counts"))) for count in counts]
    if len(set(classes)) > 1:
        texts = [f"{name}: {', '.join(names[:12])}" for name, names in zip(unique_names(records), classes, strict=True)]
        notes.append(f"Scores cannot be compared directly, because the classes differ. {'; '.join(texts)}.")
    return notes


def differing_settings(records: Sequence[Run]) -> FigureTable:
    """Return a table of the settings that differ between the runs."""
    rows = []
    for key in dict.fromkeys(key for record in records for key in record.flat_settings if key != "output"):
        values = [format_value(record.setting(key)) if key in record.flat_settings else "" for record in records]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return FigureTable("Values by run", ("setting", *unique_names(records)), rows)


def same_prompts(records: Sequence[Run], limit: int = 8) -> list[dict[str, Any]]:
    """Return the prompts that at least two runs answered, with the last answer of each run."""
    names = unique_names(records)
    answers: dict[str, dict[str, Any]] = {}
    for name, record in zip(names, records, strict=True):
        for sample in sorted(record.metrics.samples, key=lambda sample: sample.step):
            entry = answers.setdefault(sample.prompt, {"expected": sample.expected, "row": sample.row, "by_run": {}})
            entry["by_run"][name] = sample.answer
    shared = [(prompt, entry) for prompt, entry in answers.items() if len(entry["by_run"]) > 1]
    return [
        {
            "name": f"Row {entry['row']}" if entry["row"] is not None else f"Prompt {number}",
            "prompt": prompt[:2000],
            "expected": entry["expected"],
            "answers": [(run, text[:2000] or "(empty)") for run, text in entry["by_run"].items()],
        }
        for number, (prompt, entry) in enumerate(shared[:limit], 1)
    ]


# Attributes of a run that are copied to JSON unchanged.
_RECORD_FIELDS = (
    *("state", "reason", "model", "task", "method", "steps", "total_steps"),
    *("seconds", "rows_per_second", "started", "changed"),
)


def runs_as_dicts(records: Sequence[Run]) -> list[dict[str, Any]]:
    """Return each run as plain values for JSON."""
    return [
        {
            "name": name,
            "folder": os.fspath(record.path),
            "rows": int(record.metrics.total("rows")),
            "held_out_loss": record.held_out_losses[-1][1] if record.held_out_losses else None,
            "score": None if record.score is None else dict(zip(("metric", "value"), record.score, strict=True)),
            "eval": {
                name: evaluations[-1][1]
                for name in record.metrics.metric_names()
                if (evaluations := record.metrics.evaluated(name))
            },
            "peak_memory_bytes": record.peak_bytes,
            "planned_memory_bytes": record.planned_bytes,
            "error": dict(record.part("error")) or None,
            **{key: getattr(record, key) for key in _RECORD_FIELDS},
        }
        for name, record in zip(unique_names(records), records, strict=True)
    ]


STYLES = {FINISHED: "green", RUNNING: "cyan", INTERRUPTED: "yellow"}
# Maximum width of run names and model names, and the gap between columns.
MAX_NAME_WIDTH = 34
MAX_MODEL_WIDTH = 26
COLUMN_GAP = 3


@dataclass(frozen=True)
class Column:
    """Column of the list of runs.

    Attributes:
        title: Header.
        text: Formats a run's cell.
        drop_order: Order in which columns are dropped from a narrow table, highest first. 0 is never dropped.
        right: True to right-align the cells.
    """

    title: str
    text: Callable[[Run], str]
    drop_order: int
    right: bool = True


def _steps(record: Run) -> str:
    total = record.total_steps
    return f"{record.steps:,}" if total in (None, record.steps) else f"{record.steps:,}/{total:,}"


def _score(record: Run) -> str:
    score = record.score
    return "" if score is None or score[0] == record.loss_metric else f"{metric_name(score[0])} {metric_value(*score)}"


def _model(record: Run) -> str:
    reference = record.model.rstrip("/")
    scheme, _, name = reference.partition(":")
    last = name if f"{scheme}:" in ("pypi:", *SCHEMES) else reference.rpartition("/")[2]
    return one_line(last, MAX_MODEL_WIDTH, end=True)


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
    Column("when", lambda record: format_time(record.started, short=True), 9),
)


def runs_table(records: Sequence[Run], width: int, columns: Sequence[Column] = COLUMNS) -> RenderableType:
    """Return a table with a line per run, sorted by start time, followed by the reasons of failed runs.

    Columns are dropped until the table fits ``width`` characters, if possible.
    """
    all_columns = columns
    records = sorted(records, key=lambda record: record.started)
    names = [one_line(name, MAX_NAME_WIDTH, end=True) for name in unique_names(records)]
    cells = {column.title: [column.text(record) for record in records] for column in all_columns}
    columns = [column for column in all_columns if any(cells[column.title])]
    while True:
        needed = _width("run", names) + sum(_width(c.title, cells[c.title]) for c in columns)
        if needed - COLUMN_GAP <= width or all(column.drop_order == 0 for column in columns):
            break
        last = max(column.drop_order for column in columns)
        columns = [column for column in columns if column.drop_order != last]
    result = table(["run", *(column.title for column in columns)])
    for column, table_column in zip(columns, result.columns[1:], strict=True):
        table_column.justify = "right" if column.right else "left"
    for index, (name, record) in enumerate(zip(names, records, strict=True)):
        state = Text(record.state, STYLES.get(record.state, "red"))
        add_row(result, [name, *(state if c.title == "state" else cells[c.title][index] for c in columns)])
    failed = [(name, run) for name, run in zip(names, records, strict=True) if run.state in (FAILED, DIVERGED, KILLED)]
    notes = [Text(one_line(f"{name}: {run.reason}", width), "red") for name, run in failed if run.reason]
    dropped = [column.title for column in all_columns if any(cells[column.title]) and column not in columns]
    if dropped:
        notes.append(Text(f"a wider terminal also shows {', '.join(dropped)}; --json has everything", style="dim"))
    return Group(result, *notes)


def comparison_tables(records: Sequence[Run], width: int) -> list[RenderableType]:
    """Return tables of results and differing settings with a column per run, split to fit ``width`` characters."""
    names = [one_line(name, MAX_NAME_WIDTH, end=True) for name in unique_names(records)]
    runs_per_table = max(1, (width - 26) // max(14, max(len(name) for name in names) + 3))
    parts: list[RenderableType] = []
    results = result_rows(records)
    differences = differing_settings(records)
    for start in range(0, len(records), runs_per_table):
        selected = slice(start, start + runs_per_table)
        for numbers, title in ((results, results.head[0]), (differences, "settings that differ")):
            if numbers.rows:
                rows = [(first, *cells[selected]) for first, *cells in numbers.rows]
                parts.append(table([title, *names[selected]], rows, fold=True))
    parts += [Text(note, "yellow") for note in comparison_notes(records)]
    if not differences.rows:
        parts.append(Text("the settings are identical except for the output folder"))
    return parts


def _width(title: str, cells: Sequence[str]) -> int:
    return max(len(title), *(len(cell) for cell in cells)) + COLUMN_GAP
