"""Scores and answers of one or more models side by side, as tables a person can read at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from deltaw.export.deploy import Deployed
from deltaw.reports.tables import Cell, one_line, table
from deltaw.reports.wording import metric_name
from deltaw.training.drift import GeneralAnswer
from deltaw.training.evaluation.base import Evaluation, Interval, is_share, metric_format, paired_difference

if TYPE_CHECKING:
    from deltaw.serving.harness import TaskScore

# Characters of a question and of an answer that a table shows; the end of a question says the most.
QUESTION, ANSWER = 72, 40
# Characters of a general answer.
GENERAL = 160


def score_table(
    scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> Table:
    """One row a metric, one column a model.

    Args:
        scores: metrics by model name; metrics that a model lacks are left empty.
        intervals: by model name the 95 % intervals of those metrics that have one.
    """
    rows: list[list[str]] = []
    for metric in dict.fromkeys(m for metrics in scores.values() for m in metrics):
        rows.append([metric_name(metric), *(_number(metric, metrics.get(metric)) for metrics in scores.values())])
        bounds = [(intervals or {}).get(name, {}).get(metric) for name in scores]
        if any(bound is not None for bound in bounds):
            ranges = [b and f"{_number(metric, b[0])} – {_number(metric, b[1])}" for b in bounds]
            rows.append(["  95 % interval", *[text or "" for text in ranges]])
    return table(["", *scores], rows, fold=True)


def difference_line(before: Evaluation, after: Evaluation) -> str | None:
    """Say whether the adapter differs from the base model on the same rows; None if that cannot be computed."""
    if (found := paired_difference(before, after)) is None:
        return None
    change, bounds = found
    share = is_share(after.main)
    shown, low, high = (f"{100 * one:+.1f}" if share else f"{one:+.4f}" for one in (change, *bounds))
    told = f"{metric_name(after.main)} {shown}{' points' if share else ''} (95 % interval {low} to {high})"
    same = bounds[0] <= 0 <= bounds[1]
    return f"base and adapter do not differ: {told}" if same else f"difference of adapter and base: {told}"


def task_table(scores: Mapping[str, Sequence[TaskScore]]) -> Table:
    """Metrics of lm-evaluation-harness with their standard errors: one row a metric, one column a model.

    Args:
        scores: by model, of the same tasks.
    """
    rows: list[list[Cell]] = []
    last = ""
    for same in zip(*scores.values(), strict=True):
        one, direction = same[0], {True: " ↑", False: " ↓", None: ""}[same[0].higher_is_better]
        told, last = "" if one.task == last else one.task, one.task
        values = [f"{s.value:.4f}" + ("" if s.stderr is None else f" ± {s.stderr:.4f}") for s in same]
        counts = ["" if number is None else f"{number:,}" for number in (one.rows, one.fewshot)]
        rows.append([told, one.metric + direction, *counts, *values])
    return table(["task", "metric", "rows", "shots", *scores], rows, left=2, fold=True)


def confusion_table(classes: Sequence[str], counts: np.ndarray) -> Table:
    """How often rows of a class (down) were taken for a class (across); the right ones are green.

    Args:
        counts: (classes, classes).
    """
    names = [one_line(name, ANSWER) for name in classes]
    rows: list[list[Cell]] = []
    for true, row in enumerate(counts):
        styles = ["green" if predicted == true else "red" if count else "" for predicted, count in enumerate(row)]
        rows.append([names[true], *(Text(f"{n:,}", style=style) for n, style in zip(row, styles, strict=True))])
    return table(["", *names], rows, fold=True, title="true class, down; predicted, across")


def answer_table(rows: Sequence[tuple[str, str, Mapping[str, tuple[str, bool]]]]) -> Table:
    """What each model wrote, green where it is what the data says.

    Args:
        rows: question, expected answer, and by model name what it wrote and whether that is right.
    """
    heads = ["question", "expected", *(rows[0][2] if rows else ())]
    lines: list[list[Cell]] = [
        [one_line(question, QUESTION, end=True), one_line(expected, ANSWER)]
        + [Text(one_line(text, ANSWER), style="green" if right else "red") for text, right in written.values()]
        for question, expected, written in rows
    ]
    return table(heads, lines, left=len(heads), fold=True)


def agreement_table(deployed: Deployed) -> Table:
    """Questions with the answers of a run and of the program that it was deployed to; equal ones are green."""
    lines: list[list[Cell]] = []
    for one in deployed.asked:
        style = "green" if one.exact else ""
        answers = [Text(one_line(text, ANSWER), style=style) for text in (one.run, one.program)]
        lines.append([one_line(one.question, ANSWER, end=True), *answers, Text(f"{one.similarity:.0%}", style=style)])
    return table(["question", "run", deployed.program, "similar"], lines, left=3, fold=True)


def general_table(rows: Sequence[GeneralAnswer]) -> Table:
    """General prompts with both models' answers: what a person reads to see whether the model still talks."""
    lines = [[one_line(text, GENERAL) for text in (row.prompt, row.base, row.adapter)] for row in rows]
    return table(["general question", "base", "adapter"], lines, left=3, fold=True)


def _number(metric: str, value: float | None) -> str:
    return "" if value is None else format(value, metric_format(metric))
