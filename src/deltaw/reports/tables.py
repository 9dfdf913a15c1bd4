"""Tables for a terminal: numbers in columns, and facts one a line. Knows no run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

Cell: TypeAlias = str | Text


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


def facts(rows: Iterable[tuple[str, Cell]], width: int, *, fold: bool) -> Table:
    """Names and what is to be said of each, in at most ``width`` columns.

    Args:
        fold: continue what is too long on further lines; else a fact is one line, and its end is cut off.
    """
    made = Table.grid(padding=(0, 2, 0, 0), expand=False)
    made.width = width
    made.add_column(no_wrap=True, style="dim")
    made.add_column(no_wrap=not fold, overflow="fold" if fold else "ellipsis", ratio=1)
    for row in rows:
        add_row(made, row)
    return made


def one_line(text: str, most: int, *, end: bool = False) -> str:
    """A text in one line of at most ``most`` characters; where ``end``, its end is kept."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return "…" + line[-(most - 1) :] if end else line[: most - 1] + "…"
