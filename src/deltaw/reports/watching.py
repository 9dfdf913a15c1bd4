"""Runs followed from another terminal: one run as a live line, several as a table, and lines in a file.

It reads the runs' folders alone. It takes no lock and writes nothing, so that no run notices it.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.text import Text

from deltaw.errors import UserError
from deltaw.machine.memory import resident_bytes
from deltaw.reports.progress import LiveLine, clock, running_mean
from deltaw.reports.runs import COLUMNS, FOLDER, Column, names_of, place_of, runs_table
from deltaw.reports.tables import WIDTH, Output
from deltaw.reports.wording import count, duration, gigabytes, metric_name, metric_value, short
from deltaw.reports.working import NEXT_LINE
from deltaw.runs.folder import FINISHED, KILLED, RUNNING, STATES, Run, find_runs, is_alive, is_run

# Seconds between two looks, and the least time from one look to the next in times of what a look takes.
REFRESH, PATIENCE = 1.0, 20
# States of a run that has begun.
BEGUN = (*STATES, KILLED)
# Steps that the speed and the time left follow from.
RECENT = 50

Emit = Callable[[dict[str, Any]], None]


def watch(names: Sequence[str], out: Output, emit: Emit | None = None) -> int:
    """Show runs until each has ended.

    Args:
        names: of runs or of folders of them, of which those are shown that go on; without names the folder ``runs``.
            One that is not there yet is waited for.
        emit: takes plain values of a run whenever they have changed, instead of what is shown.

    Returns:
        the exit status: 0 if every run finished, 1 if one did not, 130 where Ctrl-C ended the watching.
    """
    seen: dict[Path, None] = {}
    display = _Values(out, emit) if emit else _Drawn(out) if out.redraws else _Lines(out)
    try:
        with contextlib.closing(display):
            while True:
                began = time.monotonic()
                runs, waiting = _look(names or (FOLDER,), seen)
                display.show(dict(zip(names_of(runs), runs, strict=True)), waiting)
                if not waiting and all(run.state != RUNNING for run in runs):
                    return 0 if all(run.state == FINISHED for run in runs) else 1
                time.sleep(max(REFRESH, PATIENCE * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return 130


def _look(names: Sequence[str], seen: dict[Path, None]) -> tuple[list[Run], dict[str, str]]:
    """The runs as they stand, and by name what is waited for; ``seen`` keeps the runs that were shown once."""
    waiting = {}
    for name in names:
        try:
            path, hint = place_of(name), ""
        except UserError as error:
            path, hint = Path(name), f" ({error.hint})" if "did you mean" in str(error.hint) else ""
        several = path.is_dir() and not is_run(path)
        found = find_runs(path) if several else [path]
        seen.update({run: None for run in found if _read(run).state in ((RUNNING,) if several else BEGUN)})
        if not seen.keys() & {*found}:
            waiting[name] = f"waiting for {f'a run in {name}' if several else name} to start{hint}"
    return [_read(path) for path in seen], waiting


def _read(path: Path) -> Run:
    run = Run(path)
    # A process that has ended since its file was read may have written its last word.
    return Run(path) if run.state == KILLED else run


def line_of(run: Run) -> LiveLine:
    """How far a run is, as its own terminal shows it; the memory is its process's, once it has ended its peak."""
    columns, steps, mean = run.metrics.columns, min(len(run.metrics), RECENT), None
    values, lengths = (run.metrics.column(name)[1].tolist() for name in (run.progress, "length"))
    for value in values[-2 * RECENT :]:
        mean = running_mean(mean, value)
    tokens, seconds = (float(np.nansum(columns[name][-RECENT:])) if columns else 0.0 for name in ("tokens", "seconds"))
    total = run.total_steps or run.steps
    return LiveLine(
        total,
        run.steps,
        value=values[-1] if values else None,
        mean=mean,
        tokens_per_second=tokens / seconds if seconds else None,
        memory=_memory(run),
        planned=run.planned_bytes,
        left=seconds / steps * (total - run.steps) if steps and run.state == RUNNING else None,
        metric=run.progress,
        length=lengths[-1] if lengths else None,
    )


def _memory(run: Run) -> int:
    process = run.part("process")
    if run.state == RUNNING and is_alive(process):
        return resident_bytes(int(process["id"]))
    return run.peak_bytes or 0


def evaluated(run: Run) -> str:
    """The last evaluation, such as ``held-out loss 0.4213, exact match 80.0% at step 50``; empty if there is none."""
    step, metrics = (run.metrics.evaluations or [(0, {})])[-1]
    told = ", ".join(f"{metric_name(name)} {metric_value(name, value)}" for name, value in metrics.items())
    return f"held-out {told} at step {step:,}" if told else ""


def ending(run: Run) -> str:
    """What a run came to, with its reason if it did not finish."""
    told = f"{run.state} after {run.steps:,} steps in {duration(run.seconds)}"
    if run.state == FINISHED:
        return "; ".join(part for part in (told, evaluated(run)) if part)
    return f"{told}: {run.reason}" if run.reason else told


def values_of(name: str, run: Run) -> dict[str, Any]:
    """How far a run is as plain values."""
    line, last = line_of(run), None
    for step, metrics in run.metrics.evaluations[-1:]:
        last = {"step": step, **{name: value if math.isfinite(value) else None for name, value in metrics.items()}}
    return {
        "name": name,
        "folder": os.fspath(run.path),
        "state": run.state,
        "reason": run.reason,
        "step": line.step,
        "total_steps": run.total_steps,
        line.metric: line.value,
        f"mean_{line.metric}": line.mean,
        "tokens_per_second": line.tokens_per_second,
        "seconds_left": line.left,
        "memory_bytes": line.memory or None,
        "planned_memory_bytes": line.planned,
        "evaluation": last,
    }


def _mean(run: Run, metric: str) -> str:
    line = line_of(run)
    return short(line.mean) if line.metric == metric and line.mean is not None else ""


WATCHED = (
    *(column for column in COLUMNS if column.title in ("state", "steps", "held-out", "score")),
    Column("loss", lambda run: _mean(run, "loss"), 1),
    Column("reward", lambda run: _mean(run, "reward"), 1),
    Column("tokens/s", lambda run: count(run.tokens_per_second) if run.seconds else "", 6),
    Column("left", lambda run: "" if (left := line_of(run).left) is None else clock(left), 2),
    Column("memory", lambda run: gigabytes(_memory(run)) if _memory(run) else "", 7),
)


class _Lines:
    """A line now and then, one for each evaluation, and one at the end. Holds no control characters."""

    def __init__(self, out: Output) -> None:
        self.out = out
        self._said: dict[Path, float] = {}
        self._told: dict[object, object] = {}

    def show(self, runs: Mapping[str, Run], waiting: Mapping[str, str]) -> None:
        for name, line in waiting.items():
            if self._is_new(name, True):
                self.out.say(line)
        for name, run in runs.items():
            before = f"{name}: " if len(runs) > 1 else ""
            if run.state == RUNNING:
                self.progress(before, run)
            elif self._is_new((run.path, run.started), run.state):
                self.out.say(before + ending(run))

    def _is_new(self, key: object, what: object) -> bool:
        known, self._told[key] = self._told.get(key), what
        return known != what

    def progress(self, before: str, run: Run) -> None:
        now, is_new = time.monotonic(), self._is_new(run.path, evaluated(run))
        if is_new or now - self._said[run.path] >= NEXT_LINE:
            self._said[run.path] = now
            self.out.say(before + line_of(run).words(WIDTH - len(before)))
            if is_new and evaluated(run):
                self.out.say(f"{before}{evaluated(run)}")

    def close(self) -> None:
        """Leave the terminal as it was."""


class _Drawn(_Lines):
    """What goes on is drawn anew in its place, and what is over stands above it."""

    def __init__(self, out: Output) -> None:
        super().__init__(out)
        self._live = Live(Text(), console=out, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, runs: Mapping[str, Run], waiting: Mapping[str, str]) -> None:
        super().show(runs, waiting)
        going = [run for run in runs.values() if run.state == RUNNING]
        if len(runs) > 1:
            self._live.update(runs_table([*runs.values()], self.out.width, WATCHED), refresh=True)
        else:
            parts = [part for run in going for part in (line_of(run), Text(evaluated(run), overflow="ellipsis"))]
            self._live.update(Group(*parts), refresh=True)

    def progress(self, before: str, run: Run) -> None:
        """It is in what is drawn."""

    def close(self) -> None:
        self._live.stop()


class _Values(_Lines):
    """Plain values of each run, whenever more than its memory has changed."""

    def __init__(self, out: Output, emit: Emit) -> None:
        super().__init__(out)
        self._emit = emit

    def show(self, runs: Mapping[str, Run], waiting: Mapping[str, str]) -> None:
        super().show({}, waiting)
        for name, run in runs.items():
            values = values_of(name, run)
            if self._is_new(run.path, {**values, "memory_bytes": None}):
                self._emit(values)
