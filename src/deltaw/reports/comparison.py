"""Tables and figures of method comparisons, settings searches, plans and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from deltaw.data.report import quoted
from deltaw.errors import escape_control_characters
from deltaw.experiments.comparison import (
    COLUMNS,
    Comparison,
    MethodResult,
    column_titles,
    method_cells,
    number_text,
    score_text,
    unit,
)
from deltaw.experiments.tune import Tuning, trial_cells
from deltaw.export.deploy import DeploymentResult
from deltaw.memory.plan import Plan
from deltaw.reports.memory_parts import memory_legend, memory_parts
from deltaw.reports.plan import process_parts
from deltaw.reports.svg import Bar, Figure, bars, stack, standalone, swatch
from deltaw.reports.tables import MISSING, Cell, add_row, count, gigabytes, metric_name, one_line, table
from deltaw.training.evaluation.answers import EvaluatedAnswer
from deltaw.training.evaluation.base import Evaluation, Interval, is_share, metric_format, paired_difference
from deltaw.training.monitoring.drift_probe import GeneralAnswer

if TYPE_CHECKING:
    from deltaw.evaluation.harness import TaskScore


def tuning_table(tuning: Tuning) -> Table:
    """Return a table of the best trials. The best one is green."""
    result = table(("trial", "loss", *tuning.space, "time"), num_left=0, padding=(0, 1, 0, 0))
    for rank, trial in enumerate(tuning.ranked[:8]):
        add_row(result, trial_cells(tuning, trial), "green" if rank == 0 else "")
    return result


# Number of columns about cost. On a narrow terminal, the remaining columns form a second table.
_NUM_COST_COLUMNS = 8
# Width of the full table in characters.
FULL_WIDTH = 152


def comparison_tables(comparison: Comparison, width: int) -> list[Table]:
    """Return one table, or two if one does not fit ``width`` characters.

    The best method is green, methods without a learning effect are dim, and methods that could not run are omitted.
    """
    heads = column_titles(comparison)
    indices = list(range(len(COLUMNS)))
    parts = [indices] if width >= FULL_WIDTH else [indices[:_NUM_COST_COLUMNS], [0, *indices[_NUM_COST_COLUMNS:]]]
    tables = []
    for columns in parts:
        wrapped = [heads[n].replace(" (", "\n(").replace(" rate", "\nrate").replace("y p", "y\np") for n in columns]
        target = table(wrapped, padding=(0, 1, 0, 0))
        for result in comparison.lines:
            if result.error is None:
                best = bool(comparison.ranked) and result is comparison.ranked[0]
                style = "green" if best else "" if result.ranked and result is not comparison.base else "dim"
                texts = method_cells(comparison, result)
                add_row(target, [texts[column] for column in columns], style)
        tables.append(target)
    return tables


def draw_plans(plans: Mapping[str, Plan]) -> str:
    """Return an SVG file with a bar of stacked parts per method."""
    items = [
        Bar(name, gigabytes(plan.peak_resident_bytes), stack(memory_parts(process_parts(plan))))
        for name, plan in plans.items()
    ]
    title = "Peak memory of the process"
    text = "; ".join(f"{bar.name}: {bar.note}" for bar in items)
    return standalone([Figure("plan", title, "", bars("plan", title, text, items), legend=memory_legend(items))])


def draw_comparison(comparison: Comparison) -> str:
    """Return an SVG file with the score of each method, its interval and seeds, and its peak memory."""
    memory = [_memory_figure(comparison.scored)] if comparison.scored else []
    return standalone([_score_figure(comparison), *memory])


def _score_figure(comparison: Comparison) -> Figure:
    def format_score(value: float) -> str:
        return number_text(comparison, value) + unit(comparison)

    untrained = None if comparison.base is None else comparison.base.score
    levels = (("p7", "untrained", untrained), ("p4", "one answer to every row", comparison.constant_score))
    baselines = [(kind, name, level) for kind, name, level in levels if level is not None]
    lines = [(kind, f"{name}: {format_score(level)}", level, level) for kind, name, level in baselines]
    items = []
    for result in comparison.scored:
        score = math.nan if result.score is None else result.score
        interval = [("p2", "95 % interval", *result.interval)] if result.interval is not None else []
        scores = [(seed.seed, seed.score) for seed in result.seeds if seed.score is not None and len(result.seeds) > 1]
        seeds = [("p1", f"seed {number}: {format_score(value)}", value, value) for number, value in scores]
        spans = [*interval, *lines, *seeds, ("ink", format_score(score), score, score)]
        items.append(Bar(result.method, _score_note(comparison, result), spans))
    legend = [("ink", "mean of the seeds"), ("p1", "seeds")] if len(comparison.seeds) > 1 else [("ink", "score")]
    legend += [("p2", "95 % interval"), *((kind, name) for kind, name, _ in baselines)]
    name = metric_name(comparison.metric) or "score"
    title = f"{name[0].upper()}{name[1:]} on {comparison.held_out_rows:,} held-out rows"
    text = f"{'Higher' if comparison.higher_is_better else 'Lower'} is better." if items else "No method has a score."
    chart = bars("score", title, "; ".join(f"{bar.name}: {bar.note}" for bar in items), items, format_score)
    return Figure("score", title, text, chart, legend=[(swatch(kind, area=True), label) for kind, label in legend])


def _score_note(comparison: Comparison, result: MethodResult) -> str:
    """Return the score, the number of trained parameters and if the trainings flattened."""
    notes = [score_text(comparison, result) if math.isfinite(result.score or 0.0) else MISSING]
    if result.trained_parameters is not None:
        notes.append(f"{count(result.trained_parameters)} trained")
    if result.gives_constant_answer:
        notes.append("one answer to every row")
    elif result.flattened < len(result.seeds):
        notes.append(f"{result.flattened} of {len(result.seeds)} flattened" if result.flattened else "not flattened")
    return ", ".join(notes)


def _memory_figure(results: Sequence[MethodResult]) -> Figure:
    items = []
    for result in results:
        sizes = {"planned": result.planned_bytes, "measured": result.peak_bytes}
        note = ", ".join(f"{gigabytes(size)} {name}" for name, size in sizes.items() if size) or MISSING
        planned = result.planned_bytes or 0
        peak = result.peak_bytes or math.nan
        items.append(Bar(result.method, note, [*stack([("p2", "planned", planned)]), ("ink", "measured", peak, peak)]))
    title = "Peak memory of a run"
    text = "; ".join(f"{bar.name}: {bar.note}" for bar in items)
    legend = [(swatch(kind, area=True), label) for kind, label in (("p2", "planned"), ("ink", "measured"))]
    return Figure("memory", title, "", bars("memory", title, text, items), legend=legend)


# Maximum characters of an answer in a table.
MAX_ANSWER = 40
# Marks of wrong and correct answers.
MARKS = ("✗ ", "✓ ")
# Maximum characters of a general answer, and of a question, which is truncated at the start.
MAX_GENERAL = 160


def score_table(
    scores: Mapping[str, Mapping[str, float]], intervals: Mapping[str, Mapping[str, Interval]] | None = None
) -> Table:
    """Return a table with a row per metric and a column per model.

    Args:
        scores: Metrics by model name. Missing metrics are left empty.
        intervals: 95% intervals by model name and metric.
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
    if bounds[0] <= 0 <= bounds[1]:
        return f"adapter and base: no significant difference: {text}"
    return f"difference of adapter and base: {text}"


def task_table(scores: Mapping[str, Sequence[TaskScore]]) -> Table:
    """Return a table of lm-evaluation-harness metrics with standard errors, a column per model.

    Args:
        scores: Scores of the same tasks by model.
    """
    rows: list[list[Cell]] = []
    previous_task = ""
    for task_scores in zip(*scores.values(), strict=True):
        first = task_scores[0]
        direction = {True: " ↑", False: " ↓", None: ""}[task_scores[0].higher_is_better]
        task = "" if first.task == previous_task else first.task
        previous_task = first.task
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


def answer_list(rows: Sequence[Mapping[str, EvaluatedAnswer]]) -> Table:
    """Return the complete answers of each model. The part of a wrong answer from its first difference on is red.

    Args:
        rows: For each row, the answers by model name.
    """
    result = Table.grid("", "", padding=(0, 2, 0, 0))
    for by_model in rows:
        first = next(iter(by_model.values()))
        expected = escape_control_characters(first.expected.strip())
        add_row(result, [f"row {first.row}", one_line(first.question, MAX_GENERAL, end=True)])
        if expected:
            add_row(result, ["expected", expected])
        for name, answer in by_model.items():
            text = answer.output.strip()
            start = answer.first_difference
            same, different = map(escape_control_characters, (text[:start], text[start:]) if start else ("", text))
            score = "" if answer.reward is None else f"{answer.reward:.2f}  "
            mark = MARKS[answer.exact] if expected else ""
            style = "green" if answer.exact else "red"
            add_row(result, [mark + name, Text.assemble(score, same, (different, style))])
            if start is not None:
                found, right = (quoted(t.strip()[start:], MAX_ANSWER) for t in (answer.output, first.expected))
                add_row(result, ["", f"differs from character {start + 1}: {found} instead of {right}"])
        result.add_row()
    return result


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
