"""A comparison of methods as a terminal shows it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from rich import box
from rich.table import Table
from rich.text import Text

from deltaw.durable import write_text
from deltaw.experiments.comparison import COLUMNS, SHARES, Comparison, MethodResult, cells, titles
from deltaw.experiments.tune import Tuning, trial_cells
from deltaw.training.monitoring.rates import RateSearch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox


# ---- A comparison drawn: score over trained parameters, and peak memory by method.
#
# A point is a method's score with its interval, and small marks beside it are its seeds. It is filled if every
# training flattened, hollow if not, and a gray cross if the method gives one answer to every row.
#
# Colors are of Okabe and Ito's set, which color-blind readers tell apart; each point has its name next to it,
# so that color alone tells nothing.


SCORE, SEED, PLANNED, MEASURED = "#0072B2", "#56B4E9", "#E69F00", "#0072B2"
INK, GRAY, GRID = "#222222", "#666666", "#DDDDDD"
_STYLE: dict[Any, object] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
}
# Where a label may stand next to its point, in points, the nearest first.
_PLACES: list[tuple[float, float]] = [
    (distance * x, distance * y)
    for distance in (8, 14, 22, 32, 44, 58)
    for x, y in ((1, 0.35), (-1, 0.35), (1, -0.9), (-1, -0.9), (0, 1), (0, -1.4))
]


def draw_comparison(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write the figure to ``path`` as PNG, whatever its ending."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = comparison.scored
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12, max(4.6, 1.6 + 0.52 * len(results))), dpi=150, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _draw_scores(left, comparison)
        _draw_memory(right, results)
        figure.align_titles()
        _label_points(left, canvas, comparison)
        figure.savefig(path, format="png")


def _draw_scores(axes: Axes, comparison: Comparison) -> None:
    """Score with its interval over M, on a logarithmic scale; the untrained model as a line."""
    from matplotlib.ticker import FuncFormatter

    for point in _points(comparison):
        axes.errorbar(
            point.x,
            point.value,
            yerr=[[point.value - point.low], [point.high - point.value]],
            fmt="x" if point.kind == "same" else "o",
            color=GRAY if point.kind == "same" else SCORE,
            markerfacecolor="white" if point.kind == "unfinished" else None,
            markersize=7,
            elinewidth=1.4,
            capsize=3,
            zorder=3,
        )
        if len(point.seeds) > 1:
            axes.plot([point.x] * len(point.seeds), point.seeds, "_", color=SEED, markersize=11, zorder=2)
    axes.set_xscale("log")
    axes.margins(x=0.16, y=0.12)
    factor = 100 if comparison.metric in SHARES else 1
    levels = {} if comparison.base is None else {"untrained": comparison.base.score}
    levels["one answer to every row"] = comparison.constant_score
    for text, level in levels.items():
        if level is None:
            continue
        axes.axhline(factor * level, color=GRAY, linestyle="--", linewidth=1.2, zorder=0)
        axes.annotate(
            text,
            (1, factor * level),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color=GRAY,
        )
    name = comparison.metric.replace("_", " ")
    better = "higher is better" if comparison.higher_is_better else "lower is better"
    axes.set_ylabel(f"{name}{', %' if factor == 100 else ''} ({better})")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    seeds = f", {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else ""
    rows = f"{comparison.held_out_rows} held-out rows{seeds}"
    axes.set_title(f"{name.capitalize()} on {rows}, 95 % intervals")
    kinds = {point.kind for point in _points(comparison)}
    notes = {"unfinished": "hollow: not flattened", "same": "cross: one answer to every row"}
    shown = [note for kind, note in notes.items() if kind in kinds]
    if any(len(point.seeds) > 1 for point in _points(comparison)):
        shown.insert(0, "short lines: seeds")
    axes.set_xlabel("\n".join(["trained parameters", *(["; ".join(shown)] if shown else [])]))
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_memory(axes: Axes, results: Sequence[MethodResult]) -> None:
    """Horizontal bars, in the order of the table: planned above measured."""
    largest = max((b for r in results for b in (r.planned_bytes, r.peak_bytes) if b is not None), default=1)
    unit, factor = ("GB", 1e9) if largest >= 1e9 else ("MB", 1e6)
    kinds = [
        ("planned", PLANNED, [r.planned_bytes for r in results]),
        ("measured", MEASURED, [r.peak_bytes for r in results]),
    ]
    kinds = [kind for kind in kinds if any(value is not None for value in kind[2])]
    height = 0.76 / max(1, len(kinds))
    for number, (name, color, values) in enumerate(kinds):
        offset = (number - (len(kinds) - 1) / 2) * height
        places = [place + offset for place in range(len(results))]
        lengths = [(value or 0) / factor for value in values]
        axes.barh(places, lengths, height * 0.92, color=color, label=name)
        for place, value in zip(places, values, strict=True):
            if value is not None:
                axes.annotate(
                    f"{value / factor:.2f}" if factor == 1e9 else f"{value / factor:.0f}",
                    (value / factor, place),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
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
    """Put each name where it covers no point, no interval and no other name."""
    from matplotlib.transforms import Bbox

    canvas.draw()
    renderer = canvas.get_renderer()
    taken: list[Bbox] = []
    points = _points(comparison)
    for point in points:
        (left, bottom), (_, top) = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
        middle = axes.transData.transform((point.x, point.value))[1]
        taken.append(Bbox([[left - 3, bottom - 3], [left + 3, top + 3]]))
        taken.append(Bbox([[left - 9, middle - 9], [left + 9, middle + 9]]))
    taken += [text.get_window_extent(renderer) for text in axes.texts]
    inside = axes.get_window_extent(renderer)
    for point in points:
        at = (point.x, point.value)
        best: tuple[float, tuple[float, float], Bbox | None] = (math.inf, _PLACES[0], None)
        for place in _PLACES:
            text = axes.annotate(point.name, at, xytext=place, textcoords="offset points", ha=_side(place))
            box = text.get_window_extent(renderer).padded(2)
            text.remove()
            covered = sum(_shared(box, other) for other in taken) + _outside(box, inside)
            if covered < best[0]:
                best = (covered, place, box)
            if covered == 0:
                break
        _, place, found = best
        line = None
        if max(abs(place[0]), abs(place[1])) > 14:
            line = {"arrowstyle": "-", "color": GRAY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(point.name, at, xytext=place, textcoords="offset points", ha=_side(place), arrowprops=line)
        if found is not None:
            taken.append(found)


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
    """Where the methods stand; those with the same M side by side, so that both intervals are seen."""
    factor = 100 if comparison.metric in SHARES else 1
    placed = sorted((r for r in comparison.scored if r.trained_parameters), key=lambda r: r.trained_parameters or 0)
    logs = [math.log10(r.trained_parameters or 1) for r in placed]
    gap = 0.02 * (max(logs, default=0.0) - min(logs, default=0.0))
    points = []
    last = -math.inf
    for result, log in zip(placed, logs, strict=True):
        last = max(log, last + gap)
        value = factor * (result.score or 0.0)
        low, high = result.interval or (result.score or 0.0, result.score or 0.0)
        low, high = min(value, factor * low), max(value, factor * high)
        seeds = tuple(factor * seed.score for seed in result.seeds if seed.score is not None)
        points.append(_Point(result.method, 10**last, value, low, high, seeds, _kind(result)))
    return points


def _kind(result: MethodResult) -> str:
    if result.learned_nothing:
        return "same"
    return "unfinished" if result.flattened < len(result.seeds) else "finished"


def _side(place: tuple[float, float]) -> str:
    return "center" if place[0] == 0 else "left" if place[0] > 0 else "right"


def _shared(one: Bbox, other: Bbox) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def _outside(box: Bbox, frame: Bbox) -> float:
    """How much of a name lies outside of the axes."""
    return box.width * box.height - _shared(box, frame)


def _count(value: float) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


# ---- A search for settings as a terminal shows it.


# Trials in the table.
SHOWN = 8


def tuning_table(tuning: Tuning) -> Table:
    """The best trials; the one with the settings as they were is marked."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("trial", "loss", *tuning.space, "time"):
        table.add_column(title, justify="right", no_wrap=True)
    for place, trial in enumerate(tuning.ranked[:SHOWN]):
        style = "green" if place == 0 else ""
        table.add_row(*(Text(cell, style=style) for cell in trial_cells(tuning, trial)))
    return table


# ---- A learning-rate range test drawn: loss over rate, as an SVG of few elements with a title and a description.
#
# It is written by hand, since it is a curve and two lines, and a page can hold it as it is.


FIGURE = "learning_rate.svg"
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 44, 52
# The curve is drawn up to so many times the height from its lowest point to its first; beyond, it runs away.
ABOVE_FIRST = 1.5
SINGLE, SMOOTH, CHOSEN, USUAL = "#8aa4b8", "#0072B2", "#B4490B", "#666666"


def write_rate_figure(search: RateSearch, folder: Path) -> Path:
    """Write the figure of a range test into a run's folder."""
    path = folder / FIGURE
    write_text(path, rate_figure(search))
    return path


def rate_figure(search: RateSearch) -> str:
    """The figure as SVG."""
    rates, losses, smoothed = search.rates, search.losses, search.smoothed
    logs = [math.log10(rate) for rate in (*rates, search.chosen, search.usual)]
    left, right = min(logs), max(logs)
    low = min([*losses, *smoothed])
    high = low + ABOVE_FIRST * max(smoothed[0] - low, 1e-6) if smoothed else low + 1
    high = max(high, max(losses[: max(1, len(losses) // 2)]))

    def x(rate: float) -> float:
        return LEFT + (math.log10(rate) - left) / max(1e-9, right - left) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high - min(loss, high)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    line = " ".join(f"{x(r):.1f},{y(s):.1f}" for r, s in zip(rates, smoothed, strict=True))
    dots = "".join(f'<circle cx="{x(r):.1f}" cy="{y(s):.1f}" r="2.2"/>' for r, s in zip(rates, losses, strict=True))
    marks = "".join(
        _mark(x(rate), name, color, row)
        for row, (rate, name, color) in enumerate(
            [(search.chosen, f"chosen {search.chosen:.2g}", CHOSEN), (search.usual, f"usual {search.usual:.2g}", USUAL)]
        )
    )
    description = f"{search.why}. Loss {smoothed[0]:.4f} at rate {rates[0]:.2g}, lowest {min(smoothed):.4f}."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-labelledby="rate-title rate-description" font-family="sans-serif" font-size="13">'
        '<title id="rate-title">Learning-rate range test</title>'
        f'<desc id="rate-description">{escape(description)}</desc>'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f"{_axes(x, y, (left, right), (low, high))}"
        f'<g fill="{SINGLE}">{dots}</g>'
        f'<polyline points="{line}" fill="none" stroke="{SMOOTH}" stroke-width="2.2"/>'
        f"{marks}</svg>\n"
    )


def _mark(at: float, text: str, color: str, row: int) -> str:
    """A vertical line with its name above, on one of two rows so that names do not meet."""
    anchor = "end" if at > WIDTH / 2 else "start"
    height = 18 + 16 * row
    return (
        f'<line x1="{at:.1f}" y1="{height + 4}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}" stroke="{color}" '
        f'stroke-width="1.6" stroke-dasharray="{"none" if row == 0 else "4 3"}"/>'
        f'<text x="{at:.1f}" y="{height}" fill="{color}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _axes(
    x: Callable[[float], float], y: Callable[[float], float], logs: tuple[float, float], losses: tuple[float, float]
) -> str:
    """Both axes with their labels: powers of ten, and five losses."""
    ink, grid, foot = "#222222", "#dddddd", HEIGHT - BOTTOM
    parts = []
    for power in range(math.ceil(logs[0] - 1e-9), math.floor(logs[1] + 1e-9) + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{foot}" stroke="{grid}"/>')
        parts.append(f'<text x="{at:.1f}" y="{foot + 18}" text-anchor="middle" fill="{ink}">1e{power}</text>')
    for number in range(5):
        loss = losses[0] + number / 4 * (losses[1] - losses[0])
        at = y(loss)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}" stroke="{grid}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{ink}">{loss:.3g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle" fill="{ink}">learning rate</text>')
    parts.append(
        f'<text x="16" y="{(TOP + foot) / 2}" fill="{ink}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + foot) / 2})">training loss</text>'
    )
    return "".join(parts)


# ---- comparison


# The columns that hold what a method costs; on a narrow terminal the rest is a table of its own.
_COSTS = 8
# Characters that the whole table takes.
WIDE = 152


def comparison_tables(comparison: Comparison, width: int) -> list[Table]:
    """For a terminal of ``width`` characters: one table, or two where one would not fit.

    The best is green; what learned nothing is dim; methods that could not run are not shown.
    """
    heads = titles(comparison)
    every = range(len(COLUMNS))
    parts = [list(every)] if width >= WIDE else [list(every[:_COSTS]), [0, *every[_COSTS:]]]
    tables = []
    for columns in parts:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for column in columns:
            title = heads[column].replace(" (", "\n(").replace(" rate", "\nrate").replace("y p", "y\np")
            table.add_column(title, justify="right" if column else "left", no_wrap=True)
        for result in comparison.lines:
            if result.error is None:
                best = bool(comparison.ranked) and result is comparison.ranked[0]
                style = "green" if best else "" if result.ranked and result is not comparison.base else "dim"
                texts = cells(comparison, result)
                table.add_row(*(Text(texts[column], style=style) for column in columns))
        tables.append(table)
    return tables
