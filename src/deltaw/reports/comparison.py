"""A comparison of methods as a terminal shows it."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from deltaw.experiments.comparison import COLUMNS, Comparison, cells, titles

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
