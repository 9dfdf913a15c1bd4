"""A search for settings as a terminal shows it."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from deltaw.experiments.tuning import Tuning, trial_cells

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
