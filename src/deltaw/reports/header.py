"""What a run is about to do, as one table for a terminal: each value, and why it was chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deltaw.memory.plan import Plan
from deltaw.reports.wording import count, gigabytes, shown
from deltaw.training.callbacks import RunStart
from deltaw.version import __version__

# Columns that the table takes at most: longer lines are hard to read.
WIDTH = 100
# Characters of a value; a longer one, such as a path, is shortened at its beginning.
VALUE = 22


def run_header(start: RunStart, plan: Plan | None, limit_bytes: int | None, width: int) -> RenderableType:
    """The table, no wider than ``width``.

    Args:
        plan: of the run's memory; None where there is none. limit_bytes: that the machine gives.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), width=min(width, WIDTH))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold", max_width=VALUE, style="bold")
    table.add_column(overflow="fold", ratio=1)
    for name, value, why in header_rows(start, plan, limit_bytes):
        table.add_row(Text(name), Text(_end_of(value)), Text(why))
    title = Text(os.fspath(start.folder), style="bold").append(f"  deltaw {__version__}", style="dim")
    return Group(Text(), title, table, Text())


def header_rows(
    start: RunStart, plan: Plan | None, limit_bytes: int | None
) -> Iterator[tuple[str, str, str]]:
    """Name, value and reason of each line."""
    config, train = start.config, start.config.train
    share = start.trained_parameters / start.total_parameters if start.total_parameters else 0.0
    yield "model", config.model, f"{count(start.total_parameters)} parameters"
    trained = f"{count(start.trained_parameters)} parameters trained ({share:.2%})"
    if config.method == "lora":
        targets = shown(config.lora.target_modules)
        trained += f"; rank {config.lora.rank}, alpha {config.lora.alpha:g}, {targets}"
    yield "method", config.method, trained
    yield "data", _name(config.data.train), "" if config.data.eval is None else f"eval: {config.data.eval}"
    length = f"{train.epochs:g} epochs" if train.max_steps is None else f"max_steps: {train.max_steps}"
    yield "steps", f"{start.total_steps:,}", f"of {train.batch_size} rows; {length}"
    told = dict(start.chosen)
    rate = told.pop("train.learning_rate", None)
    schedule = f"{train.schedule}, warm-up {train.warmup:g}"
    if rate is None:
        yield "learning rate", shown(train.learning_rate), f"as set; {schedule}"
    else:
        yield "learning rate", shown(rate.value), f"{rate.why}; {schedule}"
    for name, choice in told.items():
        yield name.rpartition(".")[2].replace("_", " "), shown(choice.value), choice.why
    if plan is not None:
        of = "" if limit_bytes is None else f"of {gigabytes(limit_bytes)}; "
        yield "memory", gigabytes(plan.peak_resident_bytes), f"{of}planned, at its peak in the {plan.phase}"
    if config.track is not None:
        yield "track", config.track, "as set"


def _name(reference: object) -> str:
    return reference if isinstance(reference, str) else shown(reference)


def _end_of(value: str) -> str:
    """The end of a long value says the most."""
    return value if len(value) <= 2 * VALUE else "…" + value[-(2 * VALUE - 1) :]
