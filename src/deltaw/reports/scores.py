"""Scores and answers of one or more models side by side, as tables a person can read at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from deltaw.training.drift import GeneralAnswer

# Characters of a question and of an answer that a table shows; the end of a question says the most.
QUESTION, ANSWER = 72, 40
# Characters of a general answer.
GENERAL = 160


def score_table(
    scores: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, tuple[str, tuple[float, float] | None]] | None = None,
) -> Table:
    """One row a metric, one column a model.

    Args:
        scores: metrics by model name; metrics that a model lacks are left empty.
        intervals: by model name its main metric, and that metric's 95 % interval where there is one.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    for metric in dict.fromkeys(m for metrics in scores.values() for m in metrics):
        cells = [_number(metric, metrics.get(metric)) for metrics in scores.values()]
        table.add_row(metric.replace("_", " "), *cells)
        found = [(intervals or {}).get(name, ("", None)) for name in scores]
        bounds = [interval if main == metric else None for main, interval in found]
        if any(bound is not None for bound in bounds):
            ranges = [b and f"{_number(metric, b[0])} – {_number(metric, b[1])}" for b in bounds]
            table.add_row("  95 % interval", *[text or "" for text in ranges])
    return table


def confusion_table(classes: Sequence[str], counts: np.ndarray) -> Table:
    """How often rows of a class (down) were taken for a class (across); the right ones are green.

    Args:
        counts: (classes, classes).
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title="true class, down; predicted, across")
    table.add_column("")
    for name in classes:
        table.add_column(_shortened(name, ANSWER), justify="right")
    for row, name in enumerate(classes):
        cells = [
            Text(f"{count:,}", style="green" if row == column else "red" if count else "")
            for column, count in enumerate(counts[row])
        ]
        table.add_row(_shortened(name, ANSWER), *cells)
    return table


def answer_table(rows: Sequence[tuple[str, str, Mapping[str, tuple[str, bool]]]]) -> Table:
    """What each model wrote, green where it is what the data says.

    Args:
        rows: question, expected answer, and by model name what it wrote and whether that is right.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("question", ratio=3)
    table.add_column("expected")
    for name in rows[0][2] if rows else ():
        table.add_column(name)
    for question, expected, written in rows:
        cells = [Text(_shortened(text, ANSWER), style="green" if right else "red") for text, right in written.values()]
        table.add_row(Text(_tail(question, QUESTION)), Text(_shortened(expected, ANSWER)), *cells)
    return table


def general_table(rows: Sequence[GeneralAnswer]) -> Table:
    """General prompts with both models' answers: what a person reads to see whether the model still talks."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("general question", ratio=2)
    table.add_column("base", ratio=3)
    table.add_column("adapter", ratio=3)
    for row in rows:
        cells = [Text(_shortened(text, GENERAL)) for text in (row.prompt, row.base, row.adapter)]
        table.add_row(*cells)
    return table


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if metric in ("exact_match", "accuracy") else f"{value:.4f}"


def _shortened(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _tail(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else "…" + line[-(length - 1) :]
