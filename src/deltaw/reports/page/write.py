"""The pages as HTML, written into a run's folder or to a file: complete, or not at all.

Templates are files of this package; every text that comes from a run is escaped by them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from deltaw.durable import write_text
from deltaw.reports.page.run_view import run_view
from deltaw.reports.page.svg import Curve, Figure, Numbers, line_chart, smoothed, swatch, thinned
from deltaw.reports.runs import differing_settings, names_of, result_rows, same_prompts
from deltaw.reports.wording import metric_name, metric_value, short, tick, when
from deltaw.training.run_folder import Run, find_runs, read_run

# ---- What the page of several runs says: results, curves in one drawing, and the settings that differ.


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
    """Training loss, every held-out metric that at least one run has, learning rate and gradient norm."""
    figures = [_column(records, "loss", "Training loss", short, smooth=True)]
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics.metric_names()))
    figures += [_metric(records, name) for name in metrics[:8]]
    figures.append(_column(records, "learning_rate", "Learning rate", short, smooth=False))
    figures.append(_column(records, "gradient_norm", "Gradient norm", short, smooth=True))
    return [figure for figure in figures if figure is not None]


def _column(
    records: Sequence[Run], column: str, title: str, wording: Callable[[float], str], *, smooth: bool
) -> Figure | None:
    found = []
    for record in records:
        steps, values = record.metrics.column(column)
        if len(steps) and smooth:
            values = smoothed(values)
        found.append(list(zip(*(part.tolist() for part in thinned(steps, values)), strict=True)))
    said = f"{title} over steps, as a running mean" if smooth else f"{title} over steps"
    return _figure(records, column.replace("_", "-"), title, said, found, wording, None)


def _metric(records: Sequence[Run], name: str) -> Figure | None:
    found = []
    for record in records:
        points = np.array(record.metrics.evaluated(name), dtype=float).reshape(-1, 2)
        found.append(list(zip(*(part.tolist() for part in thinned(*points.T)), strict=True)))
    title = f"Held-out {metric_name(name)}"
    identity = "held-out-" + "".join(letter if letter.isalnum() else "-" for letter in name)

    def wording(value: float) -> str:
        return metric_value(name, value)

    return _figure(records, identity, title, f"{title} over steps", found, wording, False)


def _figure(
    records: Sequence[Run],
    identity: str,
    title: str,
    said: str,
    found: Sequence[Sequence[tuple[float, float]]],
    wording: Callable[[float], str],
    log: bool | None,
) -> Figure | None:
    if not any(found):
        return None
    kinds = [KINDS[number % len(KINDS)] for number in range(len(records))]
    names = names_of(records)
    curves = [Curve(points, kind, dots=len(points) < 40) for points, kind in zip(found, kinds, strict=True) if points]
    drawn = line_chart(
        identity,
        title,
        said,
        curves,
        x_format=lambda value: "step 0" if value == 0 else f"{value:,.0f}",
        y_format=(lambda value: f"{100 * value:.4g}%") if wording(0.5).endswith("%") else tick,
        log=log,
        x_from=0,
        height=260 if identity == "loss" else 210,
    )
    rows = [
        (
            name,
            wording(points[0][1]),
            wording(points[-1][1]),
            wording(min(v for _, v in points)),
            f"{points[-1][0]:,.0f}",
        )
        for name, points in zip(names, found, strict=True)
        if points
    ]
    legend = [(swatch(kind), name) for kind, name, points in zip(kinds, names, found, strict=True) if points]
    head = ("run", "first", "last", "lowest", "at step")
    return Figure(identity, title, said + ".", drawn, Numbers(f"{title} by run", head, rows), legend)


# ---- write


NAME = "report.html"
# Of several runs, in the folder that holds them.
COMPARISON = "comparison.html"


@lru_cache(maxsize=1)
def _templates() -> tuple[Environment, Markup]:
    """The templates, and the style sheet that goes into each page."""
    folder = resources.files("deltaw.reports.page") / "templates"
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    style = Markup(texts.pop("style.css"))
    environment = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment, style


def run_page(record: Run) -> str:
    """One run as a page."""
    environment, style = _templates()
    return environment.get_template("run.html").render(style=style, **run_view(record)).strip() + "\n"


def comparison_page(records: Sequence[Run]) -> str:
    """Several runs side by side."""
    environment, style = _templates()
    return environment.get_template("compare.html").render(style=style, **compare_view(records)).strip() + "\n"


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
