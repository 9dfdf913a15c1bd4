"""A learning-rate range test drawn: loss over rate, as an SVG of few elements with a title and a description.

It is written by hand, since it is a curve and two lines, and a page can hold it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

from deltaw.durable import write_text
from deltaw.training.monitoring.rate_curve import RateSearch

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
    dots = "".join(
        f'<circle cx="{x(r):.1f}" cy="{y(s):.1f}" r="2.2"/>' for r, s in zip(rates, losses, strict=True)
    )
    marks = "".join(
        _mark(x(rate), name, color, row)
        for row, (rate, name, color) in enumerate(
            [
                (search.chosen, f"chosen {search.chosen:.2g}", CHOSEN),
                (search.usual, f"usual {search.usual:.2g}", USUAL),
            ]
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
    x: Callable[[float], float],
    y: Callable[[float], float],
    logs: tuple[float, float],
    losses: tuple[float, float],
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
        parts.append(
            f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{ink}">{loss:.3g}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle" fill="{ink}">learning rate</text>'
    )
    parts.append(
        f'<text x="16" y="{(TOP + foot) / 2}" fill="{ink}" text-anchor="middle" '
        f'transform="rotate(-90 16 {(TOP + foot) / 2})">training loss</text>'
    )
    return "".join(parts)
