"""Draw charts as SVG, inline or as a file: lines, heat maps, bars and histograms.

Text keeps its size at every page width: shapes are in an inner SVG that is stretched, text and grid lines are outside
of it. The labels of a vertical axis are left of the drawing, in the margin that the style sheet reserves for ``.axes``.
Colors are classes of the style sheet. The template ``drawings.html`` renders the markup.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, TypeAlias

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from deltaw.reports.tables import short


@dataclass(frozen=True)
class FigureTable:
    """Table of texts. The first cell of each row is the row's header.

    Attributes:
        caption: Title of the table.
        head: Column headers.
        rows: Cells.
        note: Text shown after the caption, for example which rows are left out.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


# Swatch and name of each series.
Legend: TypeAlias = Sequence[tuple[Markup, str]]


@dataclass(frozen=True)
class Figure:
    """Figure with its title, text and table of values.

    Attributes:
        identity: Anchor of the figure, unique on the page.
        title: Heading.
        text: One sentence that describes the figure.
        drawing: SVG markup.
        numbers: Table of the plotted values, for pages.
        legend: Swatches and names, empty for a single series.
    """

    identity: str
    title: str
    text: str
    drawing: Markup
    numbers: FigureTable = FigureTable("", (), ())
    legend: Legend = ()


# Bins of a downsampled curve. Each bin contributes its minimum and its maximum.
CURVE_BINS = 360
# Ratio of largest to smallest value above which a logarithmic scale is used.
MIN_LOG_RATIO = 25.0


def downsample(x: np.ndarray, y: np.ndarray, bins: int = CURVE_BINS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to the minimum and maximum of each of ``bins`` bins, in order, and its first and last point."""
    if len(x) <= 2 * bins:
        return x, y
    cuts = np.linspace(0, len(x), bins + 1).astype(int)
    indices = {0, len(x) - 1}
    for start, end in itertools.pairwise(cuts.tolist()):
        indices.add(start + int(np.argmin(y[start:end])))
        indices.add(start + int(np.argmax(y[start:end])))
    selected = np.array(sorted(indices))
    return x[selected], y[selected]


def running_mean(y: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Return an exponential moving average with bias correction.

    Its window is ``share`` of the curve's length, but at least four steps, or an eighth of a short curve.
    """
    if not len(y):
        return y
    decay = 1 - 1 / max(1.0, min(4.0, len(y) / 8), share * len(y))
    means = np.empty(len(y))
    mean = weight = 0.0
    for index, value in enumerate(y.tolist()):
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means[index] = mean / weight
    return means


def needs_log_scale(values: Sequence[float] | np.ndarray) -> bool:
    """Return True if all values are positive and their ratio exceeds :data:`MIN_LOG_RATIO`."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    return bool(len(finite) and finite.min() > 0 and finite.max() / finite.min() > MIN_LOG_RATIO)


def linear_ticks(low: float, high: float, max_ticks: int = 5, integers: bool = False) -> list[float]:
    """Return at most ``max_ticks`` round numbers from ``low`` to ``high``, at least one if the range is not empty.

    Args:
        integers: Return only integers.
    """
    if not high > low:
        return [low]
    rough = max((high - low) / max_ticks, 1.0 if integers else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (s * power for s in (1, 2, 2.5, 5, 10) if not integers or power > 1 or s != 2.5)
    step = next(step for step in steps if step >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Return powers of ten between two positive numbers, with multiples of 2, 3 or 5 if they fit into ``max_ticks``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p * (1 + 1e-9) <= high * 1.001]
        if len(ticks) <= max_ticks:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / max_ticks)]
    return ticks or [low]


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` indices below ``count``, evenly spaced, including the first and the last."""
    if count <= limit:
        return list(range(count))
    return sorted({round(index) for index in np.linspace(0, count - 1, limit)})


MAX_UNPLOTTED_POINTS = 2  # a chart with at most this number of points is replaced by its table
MAX_HOVER_STRIPS = 50  # positions of a chart that show their values on hover
WIDTH = 1000  # of the stretched inner drawing
# margins in pixels for the highest tick label and for the labels of the horizontal axis
TOP = 22
BOTTOM = 24
Point = tuple[float, float]
# Label of a drawing: x as a share of the width, y in pixels, text, and class of the style sheet.
TextLabel = tuple[float, float, str, str]


@lru_cache(maxsize=1)
def templates() -> tuple[Environment, Markup]:
    """Return the template environment, which escapes all text, and the style sheet of pages.

    The page's content security policy allows a single script, identified by ``script_digest``.
    """
    folder = resources.files("deltaw.reports.page") / "templates"
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    drawing_style = Markup(texts.pop("drawings.css"))
    style = drawing_style + Markup(texts.pop("style.css"))
    script = texts.pop("copy.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals |= {"script": Markup(script), "script_digest": digest, "drawing_style": drawing_style}
    return environment, style


def macro(name: str, *args: object, **kwargs: object) -> Markup:
    """Render a macro of ``drawings.html``."""
    drawings: Any = templates()[0].get_template("drawings.html").module
    return Markup(getattr(drawings, name)(*args, **kwargs))


def drawing(identity: str, title: str, description: str, height: int, **shapes: object) -> Markup:
    """Return an SVG that fills the width, with a title and a description for screen readers."""
    return macro("drawing", identity, title, description, height, **shapes)


def swatch(kind: str, *, area: bool = False) -> Markup:
    """Return the legend symbol of a line, or of an area."""
    return macro("swatch", kind, area)


# of a file, in pixels
FILE_WIDTH = 800
MARGIN = 20
AXIS_MARGIN = 44
LETTER_WIDTH = 7  # mean width of a letter in pixels, rounded up
# Characters that XML 1.0 forbids.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def standalone(figures: Sequence[Figure]) -> str:
    """Return figures, one below the other, as an SVG file with light and dark colors."""
    y = MARGIN
    width = FILE_WIDTH - 2 * MARGIN
    texts = []
    legend = []
    drawings = []
    for figure in figures:
        texts.append((MARGIN, y + 14, figure.title, "heading"))
        y += 24
        for line in textwrap.wrap(figure.text, width // LETTER_WIDTH):
            texts.append((MARGIN, y + 12, line, "quiet"))
            y += 18
        x = MARGIN
        legend_entries = figure.legend if figure.drawing else ()
        for sign, name in legend_entries:
            label_x = _size(sign, "width") + 6
            entry_width = label_x + LETTER_WIDTH * len(name) + 20
            if x + entry_width > FILE_WIDTH:
                x = MARGIN
                y = y + 20
            legend.append((x, y + 6, sign, label_x, name))
            x += entry_width
        y += 32 if legend_entries else 8
        left = AXIS_MARGIN if 'class="drawing axes"' in figure.drawing else 0
        height = _size(figure.drawing, "height")
        drawings.append((MARGIN + left, y, width - left, height, figure.drawing))
        y += height + 28
    text = macro("standalone", figures[0].title, FILE_WIDTH, y, texts, legend, drawings)
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _size(markup: Markup, dimension: str) -> int:
    """Return the width or height in pixels of the outermost element, or 0 for empty markup."""
    return next((int(pixels) for pixels in re.findall(rf' {dimension}="(\d+)"', markup)), 0)


@dataclass(frozen=True)
class ChartSeries:
    """Line of a chart.

    Attributes:
        points: x and y, sorted by x.
        kind: Classes of the style sheet, such as "c1" or "c1 raw".
        name: Name shown in the legend and on hover.
        dots: Mark each point.
    """

    points: Sequence[Point]
    kind: str
    name: str = ""
    dots: bool = False


def build_legend(curves: Sequence[ChartSeries]) -> Legend:
    """Return the swatch and the name of each named curve."""
    return [(swatch(curve.kind), curve.name) for curve in curves if curve.name]


def line_chart(
    identity: str,
    title: str,
    description: str,
    curves: Sequence[ChartSeries],
    *,
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
    log: bool | None = None,
    log_x: bool = False,
    x_from: float | None = None,
    x_name: str = "",
    from_zero: bool = False,
    height: int = 210,
) -> Markup:
    """Return a chart of curves over a common horizontal axis, or empty markup if there are too few points.

    Args:
        log: Use a logarithmic vertical axis, labeled "log scale". None chooses by :func:`needs_log_scale`.
        log_x: Use a logarithmic horizontal axis. Otherwise its ticks are integers.
        x_from: Start of the horizontal axis, or None for the first point.
        x_name: Prefix of the x value on hover.
        from_zero: Start a linear vertical axis at zero.
    """
    points = [p for curve in curves for p in curve.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not points:
        return drawing(identity, title, description, 40, texts=[(0, 24, "no data yet", "")])
    if len({x for x, _ in points}) <= MAX_UNPLOTTED_POINTS:
        return Markup()
    values = [y for _, y in points]
    log = needs_log_scale(values) if log is None else log and min(values) > 0
    low, high = _range(values, log, from_zero)
    x_min = min(x for x, _ in points) if x_from is None else x_from
    x_max = max(x for x, _ in points)
    if x_max <= x_min:
        x_min = x_min - 1
        x_max = x_max + 1
    plot = height - TOP - BOTTOM

    def down(value: float) -> float:
        return plot * (1 - _share(value, low, high, log))

    def along(value: float) -> float:
        return _share(value, x_min, x_max, log_x)

    paths = []
    for curve in curves:
        finite = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
        coordinates = [f"{WIDTH * along(x):.1f} {down(y):.1f}" for x, y in finite]
        if len(coordinates) > 1:
            paths.append((curve.kind, "M" + "L".join(coordinates)))
        if curve.dots or len(coordinates) == 1:
            # A zero-length line with round caps is rendered as a dot even if the drawing is stretched.
            paths.append((f"{curve.kind} dots", "".join(f"M{coordinate}h0" for coordinate in coordinates)))
    heights = [(TOP + down(tick), tick) for tick in (log_ticks(low, high) if log else linear_ticks(low, high))]
    across = log_ticks(x_min, x_max, 4) if log_x else linear_ticks(x_min, x_max, 4, integers=True)
    texts: list[TextLabel] = [(along(tick), height - 6, x_format(tick), "") for tick in across]
    texts += [(1, 11, "log scale", "")] if log else []
    labels = [(y + 4, y_format(tick)) for y, tick in heights]
    shapes = {"grid": [y for y, _ in heights], "plot": (TOP, plot), "paths": paths, "texts": texts, "labels": labels}
    return drawing(identity, title, description, height, **shapes, rects=_readings(curves, along, x_name, plot))


def _readings(curves: Sequence[ChartSeries], along: Callable[[float], float], x_name: str, plot: int) -> list[Rect]:
    """Return transparent strips that show each curve's value on hover, at points of the longest curve."""
    labeled = [curve for curve in curves if curve.name or len(curves) == 1]
    longest = max((curve.points for curve in labeled), key=len, default=())
    positions = [longest[index][0] for index in evenly_spaced(len(longest), MAX_HOVER_STRIPS)]
    cuts = [0.0, *((left + right) / 2 for left, right in itertools.pairwise([along(x) for x in positions])), 1.0]
    values = [(curve.name, dict(curve.points)) for curve in labeled]
    strips = []
    for x, start, end in zip(positions, cuts, cuts[1:], strict=False):
        text = ", ".join(f"{name} {short(points[x])}".strip() for name, points in values if x in points)
        strips.append(Rect("reading", start, TOP, end - start, plot, f"{x_name}{short(x)}: {text}"))
    return strips


def _range(values: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low = min(values)
    high = max(values)
    if from_zero and not log:
        low = min(0.0, low)
    if low == high:
        gap = abs(low) * 0.1 or 1.0
        return (low / 1.5, high * 1.5) if log else (low - gap, high + gap)
    if log:
        return low, high
    gap = 0.04 * (high - low)
    return (low if from_zero and low == 0 else low - gap), high + gap


def _share(value: float, low: float, high: float, log: bool) -> float:
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if log else (value - low) / (high - low)


@dataclass(frozen=True)
class Rect:
    """Rectangle. ``x`` and ``width`` are shares of the drawing's width, ``y`` and ``height`` are pixels.

    Attributes:
        kind: Classes of the style sheet.
        hover: Text shown on hover.
    """

    kind: str
    x: float
    y: float
    width: float
    height: float
    hover: str
    opacity: float | None = None


@dataclass(frozen=True)
class Strip:
    """Row of a heat map: its name, a note at its right end, and a value per column."""

    name: str
    note: str
    values: Sequence[float | None]


def heat_map(identity: str, title: str, description: str, strips: Sequence[Strip], columns: Sequence[str]) -> Markup:
    """Return rows of cells with opacity proportional to the value, relative to the largest value."""
    top = max((v for strip in strips for v in strip.values if v is not None), default=0.0) or 1.0
    line = 36
    cell = 16
    wide = 1 / max(1, len(columns))
    rects: list[Rect] = []
    texts: list[TextLabel] = []
    for y, strip in zip(range(0, line * len(strips), line), strips, strict=True):
        texts += [(0, y + 13, strip.name, ""), (1, y + 13, strip.note, "quiet")]
        for index, value in enumerate(strip.values):
            if value is not None:
                hover = f"{columns[index]}: {short(value)}"
                rects.append(Rect("cell", index * wide, y + 18, wide, cell, hover, 0.06 + 0.94 * value / top))
    height = line * len(strips) + 18
    labels = [(0.0, columns[0]), (1.0, columns[-1])] if len(columns) > 1 else [(0.0, name) for name in columns]
    texts += [(share, height - 4, name, "quiet") for share, name in labels]
    return drawing(identity, title, description, height, rects=rects, texts=texts)


# Part of a bar: class of the style sheet, text shown on hover, start and end. A part without a size is a vertical mark.
Span: TypeAlias = tuple[str, str, float, float]
MAX_BAR_NAME = 26  # characters
MARK_WIDTH = 0.004  # share of the drawing's width


@dataclass(frozen=True)
class Bar:
    """Bar with a name, a note at its right end, and parts, of which later ones are on top. NaN is left out."""

    name: str
    note: str
    spans: Sequence[Span]


def stack(parts: Sequence[tuple[str, str, float]]) -> list[Span]:
    """Return the spans of stacked parts: class of the style sheet, name and size. Only positive sizes are shown."""
    spans = []
    end = 0.0
    for kind, name, size in parts:
        if size > 0:
            spans.append((kind, name, end, end + size))
            end += size
    return spans


def bars(
    identity: str, title: str, description: str, items: Sequence[Bar], tick_format: Callable[[float], str] | None = None
) -> Markup:
    """Return horizontal bars on a common scale, or empty markup without bars.

    Args:
        tick_format: Formats the ticks of an axis around the values. None draws no axis and starts at zero.
    """
    if not items:
        return Markup()
    values = [x for bar in items for span in bar.spans for x in span[2:] if math.isfinite(x)] or [0.0]
    low, high = _range(values, False, False) if tick_format else (0.0, max(values) or 1.0)
    line = 44
    thick = 20
    height = line * len(items) + 2
    rects: list[Rect] = []
    texts: list[TextLabel] = []
    ticks = [("rule", tick_format(x), x, x) for x in linear_ticks(low, high)] if tick_format else []
    texts += [(_share(x, low, high, False), height + 14, text, "") for _, text, x, _ in ticks]
    for y, bar in zip(range(0, height, line), items, strict=False):
        name = bar.name if len(bar.name) <= MAX_BAR_NAME else bar.name[: MAX_BAR_NAME - 1] + "…"
        texts += [(0, y + 13, name, "name"), (1, y + 13, bar.note, "")]
        for kind, hover, *ends in (*ticks, *bar.spans):
            start, end = (_share(value, low, high, False) for value in ends)
            if not math.isfinite(start + end):
                continue
            if start == end:
                rects.append(Rect(f"part {kind}", start - MARK_WIDTH / 2, y + 17, MARK_WIDTH, thick + 4, hover))
            else:
                rects.append(Rect(f"part {kind}", start, y + 19, end - start, thick, hover))
    return drawing(identity, title, description, height + (18 if ticks else 0), rects=rects, texts=texts)


def histogram(identity: str, title: str, description: str, edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """Return a histogram of token counts, or empty markup for a small number of bins."""
    if len(counts) <= MAX_UNPLOTTED_POINTS:
        return Markup()
    largest = max(counts, default=0) or 1
    height = 130
    low = edges[0]
    span = (edges[-1] - edges[0]) or 1
    plot = height - 10 - BOTTOM
    rects = []
    for (start, end), number in zip(itertools.pairwise(edges), counts, strict=True):
        tall = plot * number / largest
        wide = max(0.004, (end - start) / span - 0.005)
        hover = f"{start:g} to {end - 1:g} tokens: {number:,}"
        rects.append(Rect("column", (start - low) / span, 10 + plot - tall, wide, tall, hover))
    texts = [(share, height - 6, f"{edge:,.0f} tokens", "") for share, edge in ((0, edges[0]), (1, edges[-1] - 1))]
    return drawing(identity, title, description, height, grid=[10 + plot], rects=rects, texts=texts)
