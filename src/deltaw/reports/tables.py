"""Terminal output: lines of at most 80 columns, and tables."""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.errors import escape_control_characters
from deltaw.progress import Detail

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
