"""Tables and figures of method comparisons and settings searches."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from deltaw.experiments.comparison import COLUMNS, Comparison, MethodResult, column_titles, method_cells
from deltaw.experiments.tune import Tuning, trial_cells
from deltaw.reports.tables import add_row, table
from deltaw.training.evaluation.base import SHARE_METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox


# Figure of a comparison: score over trained parameters, and peak memory by method. A point is a method's score with
# its interval; small marks are its seeds. Points are filled if every training flattened and hollow otherwise. A gray
# cross marks a method with the same answer for every row. The colors (Okabe and Ito) are distinguishable by color-blind
# readers, and each point is labeled.
SCORE, SEED, PLANNED, MEASURED = "#0072B2", "#56B4E9", "#E69F00", "#0072B2"
INK, GRAY, GRID = "#222222", "#666666", "#DDDDDD"
_STYLE: dict[Any, object] = {
    "font.size": 11,
    "figure.facecolor": "white",
    "axes.edgecolor": GRAY,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
}
_MARK: dict[str, Any] = {"markersize": 7, "elinewidth": 1.4, "capsize": 3, "zorder": 3}
# Candidate offsets of a label from its point, in typographic points, nearest first.
_LABEL_OFFSETS: list[tuple[float, float]] = [
    (distance * x, distance * y)
    for distance in (8, 14, 22, 32, 44, 58)
    for x, y in ((1, 0.35), (-1, 0.35), (1, -0.9), (-1, -0.9), (0, 1), (0, -1.4))
]


def draw_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the figure to ``path`` as PNG, regardless of its suffix."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = comparison.scored
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, max(4.6, 1.6 + 0.52 * len(results))), dpi=150, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        score_axes, memory_axes = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_scores(score_axes, comparison)
        _draw_memory(memory_axes, results)
        figure.align_titles()
        _label_points(score_axes, canvas, comparison)
        figure.savefig(path, format="png")


def _draw_scores(axes: Axes, comparison: Comparison) -> None:
    """Plot scores with intervals over the number of trained parameters (log scale), with baselines as lines."""
    from matplotlib.ticker import FuncFormatter

    points = _points(comparison)
    for point in points:
        marker, color = ("x", GRAY) if point.kind == "same" else ("o", SCORE)
        bars = [[point.value - point.low], [point.high - point.value]]
        face_color = "white" if point.kind == "unfinished" else None
        axes.errorbar(point.x, point.value, bars, fmt=marker, color=color, markerfacecolor=face_color, **_MARK)
        if len(point.seeds) > 1:
            axes.plot([point.x] * len(point.seeds), point.seeds, "_", color=SEED, markersize=11, zorder=2)
    axes.set_xscale("log")
    axes.margins(x=0.16, y=0.12)
    factor = 100 if comparison.metric in SHARE_METRICS else 1
    levels = {} if comparison.base is None else {"untrained": comparison.base.score}
    levels["one answer to every row"] = comparison.constant_score
    for text, level in levels.items():
        if level is None:
            continue
        axes.axhline(factor * level, color=GRAY, linestyle="--", linewidth=1.2, zorder=0)
        edge: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (-4, 4), "textcoords": "offset points"}
        axes.annotate(text, (1, factor * level), ha="right", color=GRAY, **edge)
    name = comparison.metric.replace("_", " ")
    better = "higher is better" if comparison.higher_is_better else "lower is better"
    axes.set_ylabel(f"{name}{', %' if factor == 100 else ''} ({better})")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    seeds = f", {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else ""
    axes.set_title(f"{name.capitalize()} on {comparison.held_out_rows} held-out rows{seeds}, 95 % intervals")
    notes = {
        "short lines: seeds": any(len(point.seeds) > 1 for point in points),
        "hollow: not flattened": any(point.kind == "unfinished" for point in points),
        "cross: one answer to every row": any(point.kind == "same" for point in points),
    }
    legend = "; ".join(note for note, applies in notes.items() if applies)
    axes.set_xlabel(f"trained parameters\n{legend}".rstrip())
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_memory(axes: Axes, results: Sequence[MethodResult]) -> None:
    """Plot horizontal bars of planned and measured memory, in the order of the table."""
    largest = max((b or 0 for r in results for b in (r.planned_bytes, r.peak_bytes)), default=0)
    unit, factor = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    planned, measured = [r.planned_bytes for r in results], [r.peak_bytes for r in results]
    kinds = [kind for kind in (("planned", PLANNED, planned), ("measured", MEASURED, measured)) if any(kind[2])]
    height = 0.76 / max(1, len(kinds))
    for number, (name, color, values) in enumerate(kinds):
        offset = (number - (len(kinds) - 1) / 2) * height
        positions = [position + offset for position in range(len(results))]
        lengths = [(value or 0) / factor for value in values]
        axes.barh(positions, lengths, height * 0.92, color=color, label=name)
        for position, value in zip(positions, values, strict=True):
            if value is not None:
                text, anchor = f" {value / factor:.{2 if factor == 1e9 else 0}f}", (value / factor, position)
                axes.annotate(text, anchor, va="center", fontsize=9)
    axes.set_yticks(range(len(results)), [result.method for result in results])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"peak memory, {unit}")
    axes.set_title("Peak memory of a run")
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if len(kinds) > 1:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)


def _label_points(axes: Axes, canvas: FigureCanvasAgg, comparison: Comparison) -> None:
    """Place each label without overlapping points, intervals or other labels."""
    from matplotlib.transforms import Bbox

    canvas.draw()
    renderer = canvas.get_renderer()
    occupied: list[Bbox] = []
    points = _points(comparison)
    for point in points:
        (left, bottom), (_, top) = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
        middle = axes.transData.transform((point.x, point.value))[1]
        occupied.append(Bbox([[left - 3, bottom - 3], [left + 3, top + 3]]))
        occupied.append(Bbox([[left - 9, middle - 9], [left + 9, middle + 9]]))
    occupied += [text.get_window_extent(renderer) for text in axes.texts]
    plot_area = axes.get_window_extent(renderer)
    for point in points:
        candidates = []
        for offset in _LABEL_OFFSETS:
            label: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": _alignment(offset)}
            text = axes.annotate(point.name, (point.x, point.value), **label)
            box = text.get_window_extent(renderer).padded(2)
            text.remove()
            outside = box.width * box.height - _overlap_area(box, plot_area)
            candidates.append((outside + sum(_overlap_area(box, other) for other in occupied), box, label))
            if candidates[-1][0] == 0:
                break
        _, box, label = min(candidates, key=lambda entry: entry[0])
        if max(map(abs, label["xytext"])) > 14:
            label["arrowprops"] = {"arrowstyle": "-", "color": GRAY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(point.name, (point.x, point.value), **label)
        occupied.append(box)


@dataclass(frozen=True)
class _Point:
    name: str
    x: float
    value: float
    low: float
    high: float
    seeds: tuple[float, ...]
    kind: str


def _points(comparison: Comparison) -> list[_Point]:
    """Return the points of the methods. Points with equal numbers of parameters are spread so that all intervals are
    visible.
    """
    factor = 100 if comparison.metric in SHARE_METRICS else 1
    by_size = sorted((r for r in comparison.scored if r.trained_parameters), key=lambda r: r.trained_parameters or 0)
    logs = [math.log10(r.trained_parameters or 1) for r in by_size]
    gap = 0.02 * (max(logs, default=0.0) - min(logs, default=0.0))
    points = []
    last = -math.inf
    for result, log in zip(by_size, logs, strict=True):
        last = max(log, last + gap)
        value = factor * (result.score or 0.0)
        low, high = result.interval or (result.score or 0.0, result.score or 0.0)
        low, high = min(value, factor * low), max(value, factor * high)
        seeds = tuple(factor * seed.score for seed in result.seeds if seed.score is not None)
        kind = "unfinished" if result.flattened < len(result.seeds) else "finished"
        kind = "same" if result.gives_constant_answer else kind
        points.append(_Point(result.method, 10**last, value, low, high, seeds, kind))
    return points


def _alignment(offset: tuple[float, float]) -> str:
    return "center" if offset[0] == 0 else "left" if offset[0] > 0 else "right"


def _overlap_area(first: Bbox, second: Bbox) -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(0.0, width) * max(0.0, height)


def _count(value: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


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
