"""Terminal output: lines of at most 80 columns, tables, and the format of metrics, durations, times and sizes."""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.errors import escape_control_characters
from deltaw.progress import Detail
from deltaw.training.evaluation.base import SHARE_METRICS, is_share

Cell: TypeAlias = str | Text
# Maximum line width in columns.
WIDTH = 80
# Set by Jupyter kernels for the commands that they start.
NOTEBOOK_VARIABLE = "JPY_PARENT_PID"
# Table width in columns for verbose logs.
VERBOSE_WIDTH = 200


class TerminalOutput(Console):
    """Console that prints lines of at most 80 columns. Tables are as wide as the terminal, or 80 columns elsewhere.

    Args:
        verbose: Print :class:`~deltaw.progress.Detail` lines, and tables with all columns.
        settings: Options of rich's Console.

    Attributes:
        spoke: Time of the last output, by :func:`time.monotonic`.
        redraws: True if lines can be redrawn in place. False for CI logs and notebook cells, which record every update.
    """

    def __init__(self, *, verbose: bool = False, **settings: Any) -> None:
        # Printed text may contain user text with brackets and colons, which must not be parsed as markup.
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "force_jupyter": False}
        super().__init__(soft_wrap=True, **plain, **settings)
        self.verbose = verbose
        self.spoke = time.monotonic()
        is_log = os.environ.get("CI", "").lower() not in ("", "0", "false") or NOTEBOOK_VARIABLE in os.environ
        can_redraw = settings.get("force_terminal") or (self.file.isatty() and not is_log)
        self.redraws = bool(can_redraw) and not self.is_dumb_terminal
        if not self.is_terminal:
            self.width = VERBOSE_WIDTH if verbose else WIDTH

    def print(self, *objects: Any, **options: Any) -> None:
        self.spoke = time.monotonic()
        super().print(*objects, **options)

    def print_line(self, line: str, style: str = "") -> None:
        """Print a line. A :class:`deltaw.progress.Detail` is printed only if ``verbose``."""
        if self.verbose or not isinstance(line, Detail):
            line = escape_control_characters(line)
            self.print(Text(wrap_line(line, min(WIDTH, self.width)), style=style))


def wrap_line(line: str, width: int = WIDTH) -> str:
    """Wrap a line at ``width`` columns with indented continuation lines. Long words, such as paths, are not split."""
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "expand_tabs": False}
    parts = []
    for part in line.split("\n"):
        indent = part[: len(part) - len(part.lstrip())] + "  "
        parts.append(textwrap.fill(part, width, subsequent_indent=indent, replace_whitespace=False, **options))
    return "\n".join(parts)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Cell]] = (), *, num_left: int = 1, fold: bool = False, **options: Any
) -> Table:
    """Return a table of plain texts without markup.

    Args:
        num_left: Number of left-aligned columns at the start. All other columns contain numbers and are
            right-aligned.
        fold: Wrap long cells. Otherwise they are truncated with an ellipsis.
        options: Options of rich's Table.
    """
    defaults = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 2, 0, 0)}
    result = Table(**{**defaults, **options})
    for index, head in enumerate(heads):
        justify: Any = "left" if index < num_left else "right"
        result.add_column(Text(head), justify=justify, no_wrap=not fold, overflow="fold" if fold else "ellipsis")
    for cells in rows:
        add_row(result, cells)
    return result


def add_row(target: Table, cells: Iterable[Cell], style: str = "") -> None:
    """Append a row. ``style`` applies to cells without a style."""
    target.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style or None)


def one_line(text: str, max_length: int, *, end: bool = False) -> str:
    """Return the text as one line of up to ``max_length`` characters, truncated at the start if ``end``."""
    line = " ".join(text.split())
    if len(line) <= max_length:
        return line
    return "…" + line[-(max_length - 1) :] if end else line[: max_length - 1] + "…"


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


def format_interval(metric: str, bounds: Sequence[float]) -> str:
    """Return the lower and the upper bound of a metric, or '' if they are missing."""
    return " – ".join(metric_value(metric, bound) for bound in bounds) if len(bounds) == 2 else ""


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
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def time_by_part(seconds: Mapping[str, float], width: int, note: str = "") -> list[str]:
    """Format the total time and its parts, longest first, in lines of at most ``width`` columns.

    Example: ``2 min 02 s: 1 min 06 s training, 31 s evaluating, 25 s other``. Parts shorter than a second and than 3%
    of the total are added to ``other``. ``note`` follows the total.
    """
    total = sum(seconds.values())
    selected = {name: part for name, part in seconds.items() if name != "other" and part >= min(1.0, 0.03 * total)}
    selected = dict(sorted(selected.items(), key=lambda item: -item[1]))
    if (other := total - sum(selected.values())) >= min(1.0, 0.03 * total):
        selected["other"] = other
    parts = (f"{duration(part)} {name}".replace(" ", "\xa0") for name, part in selected.items())
    lines = textwrap.wrap(f"{duration(total)}{note}: ".replace(" ", "\xa0") + ", ".join(parts), width)
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
    return f"{value:g}" if isinstance(value, float) else str(value)


def gigabytes(size: int) -> str:
    """Format bytes in decimal units: ``1.23 GB``, ``45.0 MB`` or ``6 kB``."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e6:.0f} MB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
