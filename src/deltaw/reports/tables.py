"""What is printed: lines of at most 80 columns, and numbers in columns. Knows no run."""

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
from deltaw.working import Detail

Cell: TypeAlias = str | Text
# Columns of what is printed: longer lines are hard to read.
WIDTH = 80
# What a notebook's kernel sets for the commands that it starts.
NOTEBOOK = "JPY_PARENT_PID"
# Columns of tables in a log where all of them are asked for.
WIDE = 200


class Output(Console):
    """Where a person reads: lines of at most 80 columns, tables as wide as a terminal, or 80 columns elsewhere.

    Args:
        verbose: whether lines on how something is computed are printed, and tables with all their columns.
        settings: of rich's Console.

    Attributes:
        spoke: when it last printed something, by :func:`time.monotonic`.
        redraws: whether a line is drawn anew in its place: on a terminal that moves its cursor. The logs of continuous
            integration and the output of a notebook's cell keep every state of such a line.
    """

    def __init__(self, *, verbose: bool = False, **settings: Any) -> None:
        # What is printed holds the user's own text, whose brackets and colons mean nothing here.
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "force_jupyter": False}
        super().__init__(soft_wrap=True, **plain, **settings)
        self.verbose = verbose
        self.spoke = time.monotonic()
        is_log = os.environ.get("CI", "").lower() not in ("", "0", "false") or NOTEBOOK in os.environ
        draws = settings.get("force_terminal") or (self.file.isatty() and not is_log)
        self.redraws = bool(draws) and not self.is_dumb_terminal
        if not self.is_terminal:
            self.width = WIDE if verbose else WIDTH

    def print(self, *objects: Any, **how: Any) -> None:
        self.spoke = time.monotonic()
        super().print(*objects, **how)

    def say(self, line: str, style: str = "") -> None:
        """Print a line; a :class:`deltaw.working.Detail` only if ``verbose``."""
        if self.verbose or not isinstance(line, Detail):
            line = escape_control_characters(line)
            self.print(Text(folded(line, min(WIDTH, self.width)), style=style))


def folded(line: str, width: int = WIDTH) -> str:
    """A line in parts of at most ``width`` columns, the further ones indented; a longer word, such as a path, stays
    whole."""
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "expand_tabs": False}
    parts = []
    for part in line.split("\n"):
        indent = part[: len(part) - len(part.lstrip())] + "  "
        parts.append(textwrap.fill(part, width, subsequent_indent=indent, replace_whitespace=False, **how))
    return "\n".join(parts)


def table(
    heads: Sequence[str], rows: Iterable[Sequence[Cell]] = (), *, left: int = 1, fold: bool = False, **options: Any
) -> Table:
    """A table of texts, which hold no markup.

    Args:
        left: how many of the first columns stand at the left; the others, numbers, at the right.
        fold: divide long texts between lines; else a cell is one line.
        options: of rich's Table.
    """
    usual = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, 2, 0, 0)}
    made = Table(**{**usual, **options})
    for place, head in enumerate(heads):
        justify: Any = "left" if place < left else "right"
        made.add_column(Text(head), justify=justify, no_wrap=not fold, overflow="fold" if fold else "ellipsis")
    for cells in rows:
        add_row(made, cells)
    return made


def add_row(made: Table, cells: Iterable[Cell], style: str = "") -> None:
    """One more line; ``style`` is that of cells that have none."""
    made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style or None)


def one_line(text: str, most: int, *, end: bool = False) -> str:
    """A text in one line of at most ``most`` characters; where ``end``, its end is kept."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return "…" + line[-(most - 1) :] if end else line[: most - 1] + "…"
