"""The pages as HTML, written into a run's folder or to a file: complete, or not at all.

Templates are files of this package; every text that comes from a run is escaped by them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.durable import write_text
from deltaw.reports.page.run_figures import over_steps, points_of, rate_figure, value_format
from deltaw.reports.page.run_view import run_view
from deltaw.reports.page.svg import Curve, Figure, Numbers, Point, drawing, macro, smoothed, templates
from deltaw.reports.runs import differing_settings, names_of, result_rows, same_prompts
from deltaw.reports.wording import metric_name, metric_value, when
from deltaw.runs.folder import Run, find_runs, read_run
from deltaw.training.callbacks import RateSearch

# Kinds of curves that the style sheet tells apart, by color and by dashes; the first is not dashed.
KINDS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")


def compare_view(records: Sequence[Run]) -> dict[str, Any]:
    """The variables of the template ``compare.html``."""
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
        "lead": ", ".join(names_of(records)),
        "contents": [(identity, text) for identity, text, there in sections if there],
        "results": result_rows(records),
        "figures": figures,
        "differences": differing_settings(records),
        "answers": answers,
        "written": when(time.time()),
    }


def compared_figures(records: Sequence[Run]) -> list[Figure]:
    """Training reward and loss, every held-out metric that at least one run has, learning rate and gradient norm."""
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
    found = [record.metrics.column(column) for record in records]
    points = [points_of(steps, smoothed(values) if smooth else values) for steps, values in found]
    said = f"{title} over steps{', as a running mean' if smooth else ''}"
    return _figure(records, column.replace("_", "-"), title, said, points, "")


def _metric(records: Sequence[Run], name: str) -> Figure | None:
    found = [np.array(record.metrics.evaluated(name), dtype=float).reshape(-1, 2) for record in records]
    title = f"Held-out {metric_name(name)}"
    identity = "held-out-" + "".join(letter if letter.isalnum() else "-" for letter in name)
    points = [points_of(*values.T) for values in found]
    return _figure(records, identity, title, f"{title} over steps", points, name, log=False)


def _figure(
    records: Sequence[Run], identity: str, title: str, said: str, found: list[list[Point]], metric: str, **axis: Any
) -> Figure | None:
    """Curves of several runs; None where no run has one."""
    drawn = [
        (name, KINDS[number % len(KINDS)], points)
        for number, (name, points) in enumerate(zip(names_of(records), found, strict=True))
        if points
    ]
    if not drawn:
        return None
    rows = []
    for name, _, points in drawn:
        values = [value for _, value in points]
        ends = (metric_value(metric, value) for value in (values[0], values[-1], min(values)))
        rows.append((name, *ends, f"{points[-1][0]:,.0f}"))
    curves = [Curve(points, kind, name, dots=len(points) < 40) for name, kind, points in drawn]
    table = Numbers(f"{title} by run", ("run", "first", "last", "lowest", "at step"), rows)
    axis |= {"y_format": value_format(metric), "height": 260 if identity == "loss" else 210}
    return over_steps(identity, title, said + ".", said, curves, table, **axis)


NAME = "report.html"
# Of a range test of the learning rate.
RATES = "learning_rate.svg"
# Of several runs, in the folder that holds them.
COMPARISON = "comparison.html"


def run_page(record: Run) -> str:
    """One run as a page."""
    return _rendered("run.html", run_view(record))


def comparison_page(records: Sequence[Run]) -> str:
    """Several runs side by side."""
    return _rendered("compare.html", compare_view(records))


def _rendered(template: str, view: Mapping[str, Any]) -> str:
    environment, style = templates()
    text = environment.get_template(template).render(style=style, **view).strip() + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # a model's text may hold lone surrogates


def rate_drawing(search: RateSearch) -> str:
    """A range test of the learning rate as an SVG that stands alone."""
    figure = rate_figure(search.as_dict())
    if figure is None or not figure.drawing:
        return str(drawing("rate-search", "Loss over learning rate", search.why, 40))
    return str(macro("alone", figure, templates()[1]))


def write_rate_figure(search: RateSearch, folder: Path) -> Path:
    """Write the figure of a range test into a run's folder."""
    path = folder / RATES
    write_text(path, rate_drawing(search))
    return path


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run's folder, from what lies there.

    Raises:
        UserError: the folder is not a run's, or cannot be written.
    """
    path = Path(folder) / NAME
    write_text(path, run_page(read_run(folder)))
    return path


def write_pages(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the page of each run below a folder, and where there are several, one that compares them."""
    runs = find_runs(Path(folder))
    written = [write_page(run) for run in runs]
    if len(runs) > 1:
        written.append(Path(folder) / COMPARISON)
        write_text(written[-1], comparison_page([read_run(run) for run in runs]))
    return written
