"""Runs on a terminal: one line a run, or a few runs side by side. Columns that do not fit are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.reports.comparing import differing_settings, names_of, result_rows
from deltaw.reports.page.figure import Numbers
from deltaw.reports.recorded import RecordedRun
from deltaw.reports.wording import count, duration, metric_name, metric_value, short, when
from deltaw.training.summary import FINISHED, INTERRUPTED, RUNNING

STYLES = {FINISHED: "green", RUNNING: "cyan", INTERRUPTED: "yellow"}
# The longest cell of a column of names.
NAME, MODEL = 34, 26


@dataclass(frozen=True)
class Column:
    """One column of the list.

    Attributes:
        title: its head. text: of a run. importance: 0 always stays; the highest goes first.
        right: numbers stand at the right.
    """

    title: str
    text: Callable[[RecordedRun], str]
    importance: int
    right: bool = True


def _steps(record: RecordedRun) -> str:
    total = record.total_steps
    return f"{record.steps:,}" if total in (None, record.steps) else f"{record.steps:,}/{total:,}"


def _score(record: RecordedRun) -> str:
    score = record.score
    if score is None or score[0] == record.loss_metric:
        return ""
    return f"{metric_name(score[0])} {metric_value(*score)}"


def _memory(record: RecordedRun) -> str:
    return "" if record.peak_bytes is None else f"{record.peak_bytes / 1e9:.2f} GB"


def _model(record: RecordedRun) -> str:
    reference = record.model.rstrip("/")
    last = reference if reference.startswith("pypi:") else reference.rpartition("/")[2]
    return _shortened(last.removeprefix("pypi:"), MODEL)


COLUMNS = (
    Column("model", _model, 8, right=False),
    Column("method", lambda record: record.method, 3, right=False),
    Column("rows", lambda record: count(record.metrics.total("rows")), 7),
    Column("steps", _steps, 5),
    Column("state", lambda record: record.state, 0, right=False),
    Column("held-out", lambda record: "" if (v := record.held_out_loss) is None else short(v), 1),
    Column("score", _score, 2),
    Column("time", lambda record: duration(record.seconds) if record.seconds else "", 4),
    Column("memory", _memory, 6),
    Column("when", lambda record: when(record.started, short=True), 9),
)


def runs_table(records: Sequence[RecordedRun], width: int) -> RenderableType:
    """One line a run, the latest last, in at most ``width`` characters where that can be."""
    records = sorted(records, key=lambda record: record.started)
    names = [_shortened(name, NAME) for name in names_of(records)]
    cells = {column.title: [column.text(record) for record in records] for column in COLUMNS}
    columns = [column for column in COLUMNS if any(cells[column.title])]
    while True:
        needed = _width("run", names) + sum(_width(c.title, cells[c.title]) for c in columns)
        if needed <= width or all(column.importance == 0 for column in columns):
            break
        last = max(column.importance for column in columns)
        columns = [column for column in columns if column.importance != last]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
    for place, (name, record) in enumerate(zip(names, records, strict=True)):
        row = [Text(name)]
        for column in columns:
            style = STYLES.get(record.state, "red") if column.title == "state" else ""
            row.append(Text(cells[column.title][place], style=style))
        table.add_row(*row)
    left_out = [column.title for column in COLUMNS if any(cells[column.title]) and column not in columns]
    if not left_out:
        return table
    note = Text(f"a wider terminal also shows {', '.join(left_out)}; --json has everything", style="dim")
    return Group(table, note)


def comparison_tables(records: Sequence[RecordedRun], width: int) -> list[RenderableType]:
    """Results and differing settings, one run a column; runs that do not fit are in further tables."""
    names = [_shortened(name, NAME) for name in names_of(records)]
    longest = max(len(name) for name in names) + 2
    at_once = max(1, (width - 26) // max(14, longest))
    parts: list[RenderableType] = []
    results, differences = result_rows(records), differing_settings(records)
    for start in range(0, len(records), at_once):
        part = slice(start, start + at_once)
        parts.append(_numbers(results, names, part))
        if differences.rows:
            parts.append(_numbers(differences, names, part, title="settings that differ"))
    if not differences.rows:
        parts.append(Text("no setting differs, apart from the folder"))
    return parts


def _numbers(numbers: Numbers, names: Sequence[str], part: slice, title: str | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title or numbers.head[0], overflow="fold")
    for name in names[part]:
        table.add_column(Text(name), justify="right", overflow="fold")
    for first, *cells in numbers.rows:
        table.add_row(Text(first), *(Text(cell) for cell in cells[part]))
    return table


def _width(title: str, cells: Sequence[str]) -> int:
    return max(len(title), *(len(cell) for cell in cells)) + 2


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-(most - 1) :]
