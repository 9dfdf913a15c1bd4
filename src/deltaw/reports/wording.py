"""Format metrics, durations, times, sizes and rates for display."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Mapping

from deltaw.training.evaluation.base import SHARE_METRICS, is_share

# Metrics displayed in percent.
PERCENT_METRICS = (*SHARE_METRICS, "macro_f1", "f1", "match", "groups_with_advantage", "clip_share")
MISSING = "–"


def metric_name(name: str) -> str:
    """Return the display name of a metric: ``exact match`` for ``exact_match``, ``trivia loss`` for ``trivia/loss``."""
    return name.replace("_", " ").replace("/", " ").replace("ndcg@", "nDCG@").replace("mrr@", "MRR@")


def metric_value(name: str, value: float | None) -> str:
    """Format shares in percent and other values with four significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    last = name.replace("/", " ").rpartition(" ")[2]
    if last in PERCENT_METRICS or is_share(last):
        return f"{value:.1%}"
    return f"{value:,.0f}" if last.startswith("passages_") else short(value)


def short(value: float | None) -> str:
    """Format four significant digits: ``0.4213``, ``12.34``, ``1,234``, ``9.2e-06``."""
    if value is None or not math.isfinite(value):
        return MISSING
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.3g}"
    if size < 1e-3:
        return f"{value:.3g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}" if size >= 1 else f"{value:.4f}"


def tick(value: float) -> str:
    """Format an axis tick: ``0.5``, ``20``, ``1,000``, ``1e-05``."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.6g}"


def rate(value: float | None) -> str:
    """Format three significant digits: ``4.00``, ``45.3``, ``1,234``."""
    if value is None or not math.isfinite(value):
        return MISSING
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def count(value: float | None) -> str:
    """Format an integer: ``12,345``, or ``4.88 M`` if it is large."""
    if value is None or not math.isfinite(value):
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Format seconds as ``4.2 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remainder:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def time_by_part(seconds: Mapping[str, float], width: int) -> list[str]:
    """Format the total time and its parts, longest first, in lines of at most ``width`` columns.

    Example: ``2 min 02 s: 1 min 06 s training, 31 s evaluating, 25 s other``. Parts shorter than a second and than 3 %
    of the total are added to ``other``.
    """
    total = sum(seconds.values())
    selected = {name: part for name, part in seconds.items() if name != "other" and part >= min(1.0, 0.03 * total)}
    selected = dict(sorted(selected.items(), key=lambda item: -item[1]))
    if (other := total - sum(selected.values())) >= min(1.0, 0.03 * total):
        selected["other"] = other
    parts = (f"{duration(part)} {name}".replace(" ", "\xa0") for name, part in selected.items())
    lines = textwrap.wrap(f"{duration(total)}: ".replace(" ", "\xa0") + ", ".join(parts), width)
    return [line.replace("\xa0", " ") for line in lines]


def format_time(seconds: float | None, *, short: bool = False) -> str:
    """Format a timestamp in local time: ``2026-11-26 05:43``."""
    if not seconds or not math.isfinite(seconds):
        return MISSING
    return time.strftime("%m-%d %H:%M" if short else "%Y-%m-%d %H:%M", time.localtime(seconds))


def format_value(value: object) -> str:
    """Format a setting's value as one line of YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(entry) for entry in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def gigabytes(size: int) -> str:
    """Format bytes in decimal units: ``1.23 GB``, ``45.0 MB`` or ``6 kB``."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e6:.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
