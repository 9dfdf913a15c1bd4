"""What the page of several runs says: results, curves in one drawing, and the settings that differ."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deltaw.reports.comparing import differing_settings, names_of, result_rows, same_prompts
from deltaw.reports.page.curves import smoothed, thinned
from deltaw.reports.page.figure import Figure, Numbers
from deltaw.reports.page.svg import Curve, line_chart, swatch
from deltaw.reports.recorded import RecordedRun
from deltaw.reports.wording import metric_name, metric_value, short, tick, when

# Kinds of curves that the style sheet tells apart, by color and by dashes; the first is not dashed.
KINDS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8")


def compare_view(records: Sequence[RecordedRun]) -> dict[str, Any]:
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


def compared_figures(records: Sequence[RecordedRun]) -> list[Figure]:
    """Training loss, every held-out metric that at least one run has, learning rate and gradient norm."""
    figures = [_column(records, "loss", "Training loss", short, smooth=True)]
    metrics = list(dict.fromkeys(name for record in records for name in record.metrics.metric_names()))
    figures += [_metric(records, name) for name in metrics[:8]]
    figures.append(_column(records, "learning_rate", "Learning rate", short, smooth=False))
    figures.append(_column(records, "gradient_norm", "Gradient norm", short, smooth=True))
    return [figure for figure in figures if figure is not None]


def _column(
    records: Sequence[RecordedRun], column: str, title: str, wording: Callable[[float], str], *, smooth: bool
) -> Figure | None:
    found = []
    for record in records:
        steps, values = record.metrics.column(column)
        if len(steps) and smooth:
            values = smoothed(values)
        found.append(list(zip(*(part.tolist() for part in thinned(steps, values)), strict=True)))
    said = f"{title} over steps, as a running mean" if smooth else f"{title} over steps"
    return _figure(records, column.replace("_", "-"), title, said, found, wording, None)


def _metric(records: Sequence[RecordedRun], name: str) -> Figure | None:
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
    records: Sequence[RecordedRun],
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
    curves = [
        Curve(points, kind, dots=len(points) < 40)
        for points, kind in zip(found, kinds, strict=True)
        if points
    ]
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
