"""Render the HTML pages and write them atomically.

The templates are part of this package and escape all text of a run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from deltaw.atomic_files import write_text
from deltaw.reports.page.run_figures import downsampled_points, rate_figure, step_figure, value_format
from deltaw.reports.page.run_view import run_view
from deltaw.reports.runs import differing_settings, result_rows, same_prompts, unique_names
from deltaw.reports.svg import ChartSeries, Figure, FigureTable, Point, running_mean, standalone, templates
from deltaw.reports.tables import format_time, metric_name, metric_value
from deltaw.runs.folder import Run, find_runs, read_run
from deltaw.training.callbacks import RateSearch

# Style sheet classes of curves with distinct colors and dash patterns. The first is solid.
KINDS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")


def compare_view(records: Sequence[Run]) -> dict[str, Any]:
    """Return the variables of the template ``compare.html``."""
    figures = compared_figures(records)
    answers = same_prompts(records)
    sections = (
        ("results", "Results", True),
        ("curves", "Curves", figures),
        ("differences", "Settings that differ", True),
        ("answers", "Answers", answers),
    )
    return {
        "title": f"{len(records)} runs compared",
        "lead": ", ".join(unique_names(records)),
        "contents": [(identity, text) for identity, text, content in sections if content],
        "results": result_rows(records),
        "figures": figures,
        "differences": differing_settings(records),
        "answers": answers,
        "written": format_time(time.time()),
    }


def compared_figures(records: Sequence[Run]) -> list[Figure]:
    """Return figures of training reward and loss, held-out metrics, learning rate and gradient norm of all runs."""
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics.metric_names()))
    figures = [
        _column(records, "reward", "Training reward", smooth=True),
        _column(records, "loss", "Training loss", smooth=True),
        *(_metric(records, name) for name in metrics[:8]),
        _column(records, "learning_rate", "Learning rate", smooth=False),
        _column(records, "gradient_norm", "Gradient norm", smooth=True),
    ]
    return [figure for figure in figures if figure is not None]


def _column(records: Sequence[Run], column: str, title: str, *, smooth: bool) -> Figure | None:
    series = [record.metrics.column(column) for record in records]
    points = [downsampled_points(steps, running_mean(values) if smooth else values) for steps, values in series]
    description = f"{title} over steps{', as a running mean' if smooth else ''}"
    return _figure(records, column.replace("_", "-"), title, description, points, "")


def _metric(records: Sequence[Run], name: str) -> Figure | None:
    evaluations = [np.array(record.metrics.evaluated(name), dtype=float).reshape(-1, 2) for record in records]
    title = f"Held-out {metric_name(name)}"
    identity = "held-out-" + "".join(letter if letter.isalnum() else "-" for letter in name)
    points = [downsampled_points(*values.T) for values in evaluations]
    return _figure(records, identity, title, f"{title} over steps", points, name, log=False)


def _figure(
    records: Sequence[Run], identity: str, title: str, text: str, points: list[list[Point]], metric: str, **axis: Any
) -> Figure | None:
    """Return a figure with a curve per run, or None if no run has points."""
    series = [
        (name, KINDS[number % len(KINDS)], curve)
        for number, (name, curve) in enumerate(zip(unique_names(records), points, strict=True))
        if curve
    ]
    if not series:
        return None
    rows = []
    for name, _, curve in series:
        values = [value for _, value in curve]
        summary = (metric_value(metric, value) for value in (values[0], values[-1], min(values)))
        rows.append((name, *summary, f"{curve[-1][0]:,.0f}"))
    curves = [ChartSeries(curve, kind, name, dots=len(curve) < 40) for name, kind, curve in series]
    table = FigureTable(f"{title} by run", ("run", "first", "last", "lowest", "at step"), rows)
    axis |= {"y_format": value_format(metric), "height": 260 if identity == "loss" else 210}
    return step_figure(identity, title, text + ".", text, curves, table, **axis)


PAGE_FILE = "report.html"
# Figure of a learning-rate range test.
RATE_FIGURE_FILE = "learning_rate.svg"
# Comparison of all runs in a folder.
COMPARISON_FILE = "comparison.html"


def run_page(record: Run) -> str:
    """Render the page of a run."""
    return render("run.html", run_view(record))


def comparison_page(records: Sequence[Run]) -> str:
    """Render the comparison of several runs."""
    return render("compare.html", compare_view(records))


def render(template: str, view: Mapping[str, Any]) -> str:
    """Render a template of this package with its style sheet."""
    environment, style = templates()
    text = environment.get_template(template).render(style=style, **view).strip() + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # generated text may contain lone surrogates


def rate_drawing(search: RateSearch) -> str:
    """Render a learning-rate range test as a standalone SVG."""
    figure = rate_figure(search.as_dict())
    return standalone([figure or Figure("rate-search", "Search of the learning rate", search.why, Markup())])


def write_rate_figure(search: RateSearch, folder: Path) -> Path:
    """Write the figure of a range test into a run's folder."""
    path = folder / RATE_FIGURE_FILE
    write_text(path, rate_drawing(search))
    return path


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run's folder.

    Raises:
        UserError: If the folder is not a run, or cannot be written.
    """
    path = Path(folder) / PAGE_FILE
    write_text(path, run_page(read_run(folder)))
    return path


def write_pages(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the page of each run below a folder, and a page that compares several runs."""
    runs = find_runs(Path(folder))
    paths = [write_page(run) for run in runs]
    if len(runs) > 1:
        paths.append(Path(folder) / COMPARISON_FILE)
        write_text(paths[-1], comparison_page([read_run(run) for run in runs]))
    return paths
