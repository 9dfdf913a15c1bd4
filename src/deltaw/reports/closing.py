"""How a run ended, for a terminal: its results, and the commands that go on from there."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.reports.page.write import NAME as REPORT
from deltaw.reports.wording import duration, gigabytes, metric_name, metric_value, rate
from deltaw.training.fit import Result
from deltaw.training.summary import FINISHED, INTERRUPTED, next_commands


def show_end(console: Console, result: Result) -> None:
    """A table on a terminal, lines elsewhere; below it the next commands, each on a line of its own, so that
    it can be copied."""
    if console.is_terminal:
        table = Table(
            box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), width=min(100, console.width)
        )
        table.add_column(no_wrap=True, style="dim")
        table.add_column(overflow="fold", ratio=1)
        for name, text in closing_rows(result):
            table.add_row(Text(name), Text(text))
        console.print()
        console.print(table, soft_wrap=False)
        console.print()
    else:
        for line in closing_lines(result):
            console.print(line)
    state = INTERRUPTED if result.interrupted else FINISHED
    commands = next_commands(result.output, state, result.method, result.writes_text)
    if (result.output / REPORT).is_file():
        console.print(f"report: {result.output / REPORT}")
    for entry in commands:
        console.print(f"next: {entry['command']}  # {entry['what']}")


def closing_rows(result: Result) -> Iterator[tuple[str, str]]:
    """Name and text of each line of the table."""
    done = result.outcome
    if result.interrupted:
        yield "interrupted", f"after {done.steps:,} steps; the adapter of the last whole step is saved"
    if done.seconds:
        yield (
            "training",
            f"{done.rows:,} rows, {done.steps:,} steps in {duration(done.seconds)}: "
            f"{rate(done.rows / done.seconds)} rows/s, {done.tokens / done.seconds:,.0f} tokens/s",
        )
    if done.steps:
        yield "training loss", f"{done.loss:.4f}, the mean over all steps"
    if result.stopped_early is not None:
        yield "stopped early", result.stopped_early
    evaluation = result.evaluation
    main = f"{evaluation.name} {evaluation.main}".strip()
    for name, value in evaluation.named_metrics().items():
        bounds = evaluation.interval if name == main else None
        interval = ""
        if bounds is not None:
            low, high = (metric_value(name, bound) for bound in bounds)
            interval = f" (95 % interval {low} to {high})"
        yield f"held-out {metric_name(name)}", metric_value(name, value) + interval
    planned = result.planned_memory_bytes
    told = "" if planned is None else f", {gigabytes(planned)} planned"
    yield "memory", f"{gigabytes(result.peak_memory_bytes)} at the peak{told}"
    if result.drift is not None:
        first, *more = result.drift.lines()
        yield "drift", first.removeprefix("drift: ")
        for line in more:
            yield "", line.strip()
    yield "adapter", os.fspath(result.output)


def closing_lines(result: Result) -> Iterator[str]:
    """The same as lines, each of which says what it is."""
    done = result.outcome
    if result.interrupted:
        steps = "1 step" if done.steps == 1 else f"{done.steps:,} steps"
        yield f"interrupted after {steps}: the adapter is saved in {result.output}"
        return
    if done.seconds:
        planned = result.planned_memory_bytes
        plan_note = "" if planned is None else f" (planned {gigabytes(planned)})"
        yield (
            f"{done.rows:,} rows in {done.seconds:.1f} s ({done.rows / done.seconds:.1f} rows/s, "
            f"{done.tokens / done.seconds:,.0f} tokens/s), "
            f"peak memory {gigabytes(result.peak_memory_bytes)}{plan_note}"
        )
        held_out = "".join(f", held-out {k} {v:.4f}" for k, v in result.evaluation.named_metrics().items())
        yield f"training loss {done.loss:.4f}{held_out}"
    if result.drift is not None:
        yield from result.drift.lines()
    yield f"the adapter is in {result.output}"
