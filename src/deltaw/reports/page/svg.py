"""Small drawings as inline SVG: curves, a heat map, bars. Text keeps its size at every width of the page.

The numbers of a vertical axis stand at the left of the drawing, which leaves room for them (the style sheet's
`.axes`). What is drawn lies in an inner SVG that is stretched; text and grid lines lie outside of it, so that the
same drawing serves a phone and a wide screen. Colors are classes of the page's style sheet. Knows no run: shapes
become markup in the template `drawings.html`.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, TypeAlias

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from deltaw.reports.wording import short


@dataclass(frozen=True)
class Numbers:
    """A table: the first cell of each row names the row.

    Attributes:
        caption: what it holds. head: of each column. rows: cells as texts.
        note: below the table, such as which rows are left out.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


# Sign and name of each thing that is drawn.
Legend: TypeAlias = Sequence[tuple[Markup, str]]


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        identity: unique on the page; an anchor. title: its heading. text: what it shows, in a sentence.
        drawing: the SVG. numbers: behind it.
        legend: sign and name of what is drawn, where it is more than one thing.
    """

    identity: str
    title: str
    text: str
    drawing: Markup
    numbers: Numbers
    legend: Legend = ()


# Places along a curve; each keeps its lowest and its highest value.
PLACES = 360
# Largest over smallest value from which a logarithmic scale is easier to read.
LOG_FROM = 25.0


def thinned(x: np.ndarray, y: np.ndarray, places: int = PLACES) -> tuple[np.ndarray, np.ndarray]:
    """At most two points for each place along the curve, its lowest and its highest, in their order; the
    first and the last point stay."""
    if len(x) <= 2 * places:
        return x, y
    cuts = np.linspace(0, len(x), places + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(cuts.tolist()):
        kept.add(start + int(np.argmin(y[start:end])))
        kept.add(start + int(np.argmax(y[start:end])))
    at = np.array(sorted(kept))
    return x[at], y[at]


def smoothed(y: np.ndarray, share: float = 0.02) -> np.ndarray:
    """A running mean whose memory is a share of the curve, at least four steps or an eighth of it, whichever
    is less; unbiased at its beginning."""
    if not len(y):
        return y
    keep = 1 - 1 / max(1.0, min(4.0, len(y) / 8), share * len(y))
    found = np.empty(len(y))
    mean = weight = 0.0
    for place, value in enumerate(y.tolist()):
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        found[place] = mean / weight
    return found


def is_logarithmic(values: Sequence[float] | np.ndarray) -> bool:
    """Whether all values are positive and spread over more than :data:`LOG_FROM`."""
    found = np.asarray(values, dtype=float)
    found = found[np.isfinite(found)]
    return bool(len(found) and found.min() > 0 and found.max() / found.min() > LOG_FROM)


def linear_ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round numbers, or ``whole`` ones, from ``low`` to ``high``: at most ``most``, at least one where the range is
    not empty."""
    if not high > low:
        return [low]
    rough = max((high - low) / most, 1.0 if whole else 0.0)
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (s * power for s in (1, 2, 2.5, 5, 10) if not whole or power > 1 or s != 2.5)
    step = next(step for step in steps if step >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten between two positive numbers; where they are few, also their double and fivefold."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p * (1 + 1e-9) <= high * 1.001]
        if len(ticks) <= most:
            break
    else:
        ticks = ticks[:: math.ceil(len(ticks) / most)]
    return ticks or [low]


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` places out of ``count``, with the first and the last."""
    if count <= most:
        return list(range(count))
    return sorted({round(place) for place in np.linspace(0, count - 1, most)})


FEW = 2  # points of a chart that are shown as numbers instead
READINGS = 50  # places of a chart that say their values
WIDTH = 1000  # of the stretched inner drawing
TOP, BOTTOM = 22, 24  # pixels for the highest number, and for the numbers of the horizontal axis
Point = tuple[float, float]
# A text of a drawing: share of the width, height in pixels, what it says, and its class of the style sheet.
Words = tuple[float, float, str, str]


@lru_cache(maxsize=1)
def templates() -> tuple[Environment, Markup]:
    """The templates, which escape all text, and the style sheet that goes into each page. The one script of a page
    is named by its digest, and the page allows no other."""
    folder = resources.files("deltaw.reports.page") / "templates"
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    style = Markup(texts.pop("style.css"))
    script = texts.pop("copy.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.globals |= {"script": Markup(script), "script_digest": digest}
    return environment, style


def macro(name: str, *given: object, **named: object) -> Markup:
    """A macro of ``drawings.html``."""
    drawings: Any = templates()[0].get_template("drawings.html").module
    return Markup(getattr(drawings, name)(*given, **named))


def drawing(identity: str, title: str, description: str, height: int, **shapes: object) -> Markup:
    """An SVG that fills the width, with a title and a description for whoever does not see it."""
    return macro("drawing", identity, title, description, height, **shapes)


def swatch(kind: str, *, area: bool = False) -> Markup:
    """The sign of a curve, or of an area, in a legend."""
    return macro("swatch", kind, area)


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        points: x and y, by x. kind: a class of the style sheet, such as "c1" or "c1 raw".
        name: in the legend, and where a pointer rests. dots: whether each point is marked.
    """

    points: Sequence[Point]
    kind: str
    name: str = ""
    dots: bool = False


def legend_of(curves: Sequence[Curve]) -> Legend:
    """The sign and the name of each curve that has one."""
    return [(swatch(curve.kind), curve.name) for curve in curves if curve.name]


def line_chart(
    identity: str,
    title: str,
    description: str,
    curves: Sequence[Curve],
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
    """Curves over one horizontal axis; empty if there are too few points for a chart.

    Args:
        log: a logarithmic vertical axis, which is said above it; None where that is easier to read.
        log_x: a logarithmic horizontal axis; another one has whole numbers.
        x_from: where it begins; None at the first point. x_name: goes before a place on it where a pointer rests.
        from_zero: the vertical axis begins at zero, if it is not logarithmic.
    """
    points = [p for curve in curves for p in curve.points if math.isfinite(p[0]) and math.isfinite(p[1])]
    if not points:
        return drawing(identity, title, description, 40, texts=[(0, 24, "nothing yet", "")])
    if len({x for x, _ in points}) <= FEW:
        return Markup()
    values = [y for _, y in points]
    log = is_logarithmic(values) if log is None else log and min(values) > 0
    low, high = _range(values, log, from_zero)
    left = min(x for x, _ in points) if x_from is None else x_from
    right = max(x for x, _ in points)
    if right <= left:
        left, right = left - 1, right + 1
    plot = height - TOP - BOTTOM

    def down(value: float) -> float:
        return plot * (1 - _share(value, low, high, log))

    def along(value: float) -> float:
        return _share(value, left, right, log_x)

    paths = []
    for curve in curves:
        finite = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
        places = [f"{WIDTH * along(x):.1f} {down(y):.1f}" for x, y in finite]
        if len(places) > 1:
            paths.append((curve.kind, "M" + "L".join(places)))
        if curve.dots or len(places) == 1:
            # A line of no length with round ends is a dot, however the drawing is stretched.
            paths.append((f"{curve.kind} dots", "".join(f"M{place}h0" for place in places)))
    heights = [(TOP + down(tick), tick) for tick in (log_ticks(low, high) if log else linear_ticks(low, high))]
    across = log_ticks(left, right, 4) if log_x else linear_ticks(left, right, 4, whole=True)
    texts: list[Words] = [(along(tick), height - 6, x_format(tick), "") for tick in across]
    texts += [(1, 11, "log scale", "")] if log else []
    labels = [(y + 4, y_format(tick)) for y, tick in heights]
    shapes = {"grid": [y for y, _ in heights], "plot": (TOP, plot), "paths": paths, "texts": texts, "labels": labels}
    return drawing(identity, title, description, height, **shapes, rects=_readings(curves, along, x_name, plot))


def _readings(curves: Sequence[Curve], along: Callable[[float], float], x_name: str, plot: int) -> list[Rect]:
    """Strips without color that say each curve's value where a pointer rests, at the points of the longest curve."""
    told = [curve for curve in curves if curve.name or len(curves) == 1]
    longest = max((curve.points for curve in told), key=len, default=())
    places = [longest[place][0] for place in evenly(len(longest), READINGS)]
    shares = [along(x) for x in places]
    cuts = [0.0, *((one + other) / 2 for one, other in itertools.pairwise(shares)), 1.0]
    values = [(curve.name, dict(curve.points)) for curve in told]
    found = []
    for x, start, end in zip(places, cuts, cuts[1:], strict=False):
        said = ", ".join(f"{name} {short(points[x])}".strip() for name, points in values if x in points)
        found.append(Rect("reading", start, TOP, end - start, plot, f"{x_name}{short(x)}: {said}"))
    return found


def _range(values: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
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
    if log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return (value - low) / (high - low)


@dataclass(frozen=True)
class Rect:
    """A rectangle: ``x`` and ``width`` are shares of the drawing's width, ``y`` and ``height`` pixels.

    Attributes:
        kind: classes of the style sheet. hover: what is shown where a pointer rests on it.
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
    """One line of a heat map: its name, what stands at its right end, and a value for each column."""

    name: str
    note: str
    values: Sequence[float | None]


def heat_map(identity: str, title: str, description: str, strips: Sequence[Strip], columns: Sequence[str]) -> Markup:
    """Strips of cells below each other; the darker a cell, the larger its share of the largest value."""
    top = max((v for strip in strips for v in strip.values if v is not None), default=0.0) or 1.0
    line, cell, wide = 36, 16, 1 / max(1, len(columns))
    rects: list[Rect] = []
    texts: list[Words] = []
    for y, strip in zip(range(0, line * len(strips), line), strips, strict=True):
        texts += [(0, y + 13, strip.name, ""), (1, y + 13, strip.note, "quiet")]
        for place, value in enumerate(strip.values):
            if value is not None:
                hover = f"{columns[place]}: {short(value)}"
                rects.append(Rect("cell", place * wide, y + 18, wide, cell, hover, 0.06 + 0.94 * value / top))
    height = line * len(strips) + 18
    ends = [(0.0, columns[0]), (1.0, columns[-1])] if len(columns) > 1 else [(0.0, name) for name in columns]
    texts += [(share, height - 4, name, "quiet") for share, name in ends]
    return drawing(identity, title, description, height, rects=rects, texts=texts)


@dataclass(frozen=True)
class Bar:
    """A bar of parts: its name and total, and the parts' kind (a class of the style sheet), name and size."""

    name: str
    note: str
    parts: Sequence[tuple[str, str, float]]


def bars(identity: str, title: str, description: str, given: Sequence[Bar]) -> Markup:
    """Bars below each other on one scale."""
    most = max(sum(size for *_, size in bar.parts) for bar in given) or 1.0
    line, thick = 44, 20
    rects: list[Rect] = []
    texts: list[Words] = []
    for y, bar in zip(range(0, line * len(given), line), given, strict=True):
        texts += [(0, y + 13, bar.name, ""), (1, y + 13, bar.note, "")]
        sofar = 0.0
        for kind, name, size in bar.parts:
            if size > 0:
                rects.append(Rect(f"part {kind}", sofar / most, y + 19, size / most, thick, name))
                sofar += size
    return drawing(identity, title, description, line * len(given) + 2, rects=rects, texts=texts)


def histogram(identity: str, title: str, description: str, edges: Sequence[float], counts: Sequence[int]) -> Markup:
    """Upright bars over bins of numbers of tokens; empty if there are too few for a chart."""
    if len(counts) <= FEW:
        return Markup()
    most, height = max(counts, default=0) or 1, 130
    low, span = edges[0], (edges[-1] - edges[0]) or 1
    plot = height - 10 - BOTTOM
    rects = []
    for (start, end), number in zip(itertools.pairwise(edges), counts, strict=True):
        tall, wide = plot * number / most, max(0.004, (end - start) / span - 0.005)
        hover = f"{start:g} to {end - 1:g} tokens: {number:,}"
        rects.append(Rect("column", (start - low) / span, 10 + plot - tall, wide, tall, hover))
    texts = [(share, height - 6, f"{edge:,.0f} tokens", "") for share, edge in ((0, edges[0]), (1, edges[-1] - 1))]
    return drawing(identity, title, description, height, grid=[10 + plot], rects=rects, texts=texts)
