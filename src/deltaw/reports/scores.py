"""Tables that compare scores and answers of one or more models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from deltaw.export.deploy import DeploymentResult
from deltaw.reports.tables import Cell, one_line, table
from deltaw.reports.wording import metric_name
from deltaw.training.drift import GeneralAnswer
from deltaw.training.evaluation.base import Evaluation, Interval, is_share, metric_format, paired_difference

if TYPE_CHECKING:
    from deltaw.serving.harness import TaskScore

# Maximum characters of a question and of an answer in a table. Questions are truncated at the start.
MAX_QUESTION, MAX_ANSWER = 72, 40
# Maximum characters of a general answer.
MAX_GENERAL = 160


def score_table(
    scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> Table:
    """Return a table with a row per metric and a column per model.

    Args:
        scores: Metrics by model name. Missing metrics are left empty.
        intervals: 95 % intervals by model name and metric.
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
    """Describe the difference of adapter and base model on the same rows, or return None if it cannot be computed."""
    if (difference := paired_difference(before, after)) is None:
        return None
    change, bounds = difference
    share = is_share(after.main)
    change_text, low, high = (f"{100 * value:+.1f}" if share else f"{value:+.4f}" for value in (change, *bounds))
    text = f"{metric_name(after.main)} {change_text}{' points' if share else ''} (95 % interval {low} to {high})"
    no_difference = bounds[0] <= 0 <= bounds[1]
    return f"base and adapter do not differ: {text}" if no_difference else f"difference of adapter and base: {text}"


def task_table(scores: Mapping[str, Sequence[TaskScore]]) -> Table:
    """Return a table of lm-evaluation-harness metrics with standard errors, a column per model.

    Args:
        scores: Scores of the same tasks by model.
    """
    rows: list[list[Cell]] = []
    previous_task = ""
    for task_scores in zip(*scores.values(), strict=True):
        first, direction = task_scores[0], {True: " ↑", False: " ↓", None: ""}[task_scores[0].higher_is_better]
        task, previous_task = "" if first.task == previous_task else first.task, first.task
        values = [f"{s.value:.4f}" + ("" if s.stderr is None else f" ± {s.stderr:.4f}") for s in task_scores]
        counts = ["" if number is None else f"{number:,}" for number in (first.rows, first.fewshot)]
        rows.append([task, first.metric + direction, *counts, *values])
    return table(["task", "metric", "rows", "shots", *scores], rows, num_left=2, fold=True)


def confusion_table(classes: Sequence[str], counts: np.ndarray) -> Table:
    """Return a table of the number of rows by true class (down) and predicted class (across). Correct ones are green.

    Args:
        counts: (classes, classes).
    """
    names = [one_line(name, MAX_ANSWER) for name in classes]
    rows: list[list[Cell]] = []
    for true, row in enumerate(counts):
        styles = ["green" if predicted == true else "red" if count else "" for predicted, count in enumerate(row)]
        rows.append([names[true], *(Text(f"{n:,}", style=style) for n, style in zip(row, styles, strict=True))])
    return table(["", *names], rows, fold=True, title="true class (down), predicted class (across)")


def answer_table(rows: Sequence[tuple[str, str, Mapping[str, tuple[str, bool]]]]) -> Table:
    """Return a table of the answers of each model. Correct answers are green.

    Args:
        rows: Question, expected answer, and by model name the answer and True if it is correct.
    """
    heads = ["question", "expected", *(rows[0][2] if rows else ())]
    lines: list[list[Cell]] = [
        [one_line(question, MAX_QUESTION, end=True), one_line(expected, MAX_ANSWER)]
        + [Text(one_line(text, MAX_ANSWER), style="green" if correct else "red") for text, correct in answers.values()]
        for question, expected, answers in rows
    ]
    return table(heads, lines, num_left=len(heads), fold=True)


def agreement_table(deployed: DeploymentResult) -> Table:
    """Return a table of answers of a run and of the program it was deployed to. Equal answers are green."""
    lines: list[list[Cell]] = []
    for check in deployed.asked:
        style = "green" if check.exact else ""
        answers = [Text(one_line(text, MAX_ANSWER), style=style) for text in (check.run, check.program)]
        similarity = Text(f"{check.similarity:.0%}", style=style)
        lines.append([one_line(check.question, MAX_ANSWER, end=True), *answers, similarity])
    return table(["question", "run", deployed.program, "similar"], lines, num_left=3, fold=True)


def general_table(rows: Sequence[GeneralAnswer]) -> Table:
    """Return a table of general prompts with the answers of both models."""
    lines = [[one_line(text, MAX_GENERAL) for text in (row.prompt, row.base, row.adapter)] for row in rows]
    return table(["general question", "base", "adapter"], lines, num_left=3, fold=True)


def _number(metric: str, value: float | None) -> str:
    return "" if value is None else format(value, metric_format(metric))
