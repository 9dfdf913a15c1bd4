"""Follow runs from another terminal: one run as a live line, several as a table, or as log lines.

Only the runs' folders are read, without locks or writes, so running trainings are not affected.
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
from deltaw.reports.live_line import LiveLine, clock, update_mean
from deltaw.reports.runs import COLUMNS, DEFAULT_FOLDER, Column, find_folder, runs_table, unique_names
from deltaw.reports.tables import WIDTH, TerminalOutput, count, duration, gigabytes, metric_name, metric_value, short
from deltaw.reports.work_display import NEXT_LINE
from deltaw.runs.folder import FINISHED, KILLED, RUNNING, STATES, Run, find_runs, is_alive, is_run

# Minimum seconds between scans, and minimum interval as a multiple of the duration of a scan.
REFRESH = 1.0
IDLE_FACTOR = 20
# States of a run that has started.
STARTED_STATES = (*STATES, KILLED)
# Number of recent steps from which the speed and the remaining time are computed.
RECENT_STEPS = 50

Emit = Callable[[dict[str, Any]], None]


def watch(names: Sequence[str], out: TerminalOutput, emit: Emit | None = None) -> int:
    """Show runs until all of them are finished or stopped.

    Args:
        names: Runs, or folders of which the active runs are shown. Without names, the folder ``runs``. A run that does
            not exist yet is waited for.
        emit: Receives plain values of a run whenever they change, instead of a display.

    Returns:
        Exit status: 0 if every run finished, 1 if not, 130 after Ctrl-C.
    """
    followed: dict[Path, None] = {}
    display = _JSONValues(out, emit) if emit else _LiveTable(out) if out.redraws else _LogLines(out)
    try:
        with contextlib.closing(display):
            while True:
                start = time.monotonic()
                runs, waiting = _scan(names or (DEFAULT_FOLDER,), followed)
                display.show(dict(zip(unique_names(runs), runs, strict=True)), waiting)
                if not waiting and all(run.state != RUNNING for run in runs):
                    return 0 if all(run.state == FINISHED for run in runs) else 1
                time.sleep(max(REFRESH, IDLE_FACTOR * (time.monotonic() - start)))
    except KeyboardInterrupt:
        return 130


def _scan(names: Sequence[str], followed: dict[Path, None]) -> tuple[list[Run], dict[str, str]]:
    """Return the current runs, and a message for each name that is waited for. New runs are added to ``followed``."""
    waiting = {}
    for name in names:
        try:
            path = find_folder(name)
            hint = ""
        except UserError as error:
            path = Path(name)
            hint = f" ({error.hint})" if "did you mean" in str(error.hint) else ""
        is_folder = path.is_dir() and not is_run(path)
        paths = find_runs(path) if is_folder else [path]
        states = (RUNNING,) if is_folder else STARTED_STATES
        followed.update({run: None for run in paths if _read(run).state in states})
        if not followed.keys() & {*paths}:
            waiting[name] = f"waiting for {f'a run in {name}' if is_folder else name} to start{hint}"
    return [_read(path) for path in followed], waiting


def _read(path: Path) -> Run:
    run = Run(path)
    # The process may have exited after its file was read, with a final update of the state.
    return Run(path) if run.state == KILLED else run


def live_line(run: Run) -> LiveLine:
    """Return the progress line of a run. The memory is that of the running process, or the peak of a process that
    exited.
    """
    columns = run.metrics.columns
    steps = min(len(run.metrics), RECENT_STEPS)
    mean = None
    values, lengths = (run.metrics.column(name)[1].tolist() for name in (run.progress, "length"))
    for value in values[-2 * RECENT_STEPS :]:
        mean = update_mean(mean, value)
    tokens, seconds = (float(np.nansum(columns[n][-RECENT_STEPS:])) if columns else 0.0 for n in ("tokens", "seconds"))
    total = run.total_steps or run.steps
    value, length = (numbers[-1] if numbers else None for numbers in (values, lengths))
    remaining = seconds / steps * (total - run.steps) if steps and run.state == RUNNING else None
    measured = (value, mean, tokens / seconds if seconds else None, _memory(run), run.planned_bytes, remaining)
    return LiveLine(total, run.steps, *measured, metric=run.progress, length=length)


def _memory(run: Run) -> int:
    process = run.part("process")
    return resident_bytes(int(process["id"])) if run.state == RUNNING and is_alive(process) else run.peak_bytes or 0


def evaluation_text(run: Run) -> str:
    """Return the last evaluation, such as ``held-out loss 0.4213, exact match 80.0% at step 50``, or ''."""
    step, metrics = (run.metrics.evaluations or [(0, {})])[-1]
    values = ", ".join(f"{metric_name(name)} {metric_value(name, value)}" for name, value in metrics.items())
    return f"held-out {values} at step {step:,}" if values else ""


def outcome_text(run: Run) -> str:
    """Return the final state of a run, with the reason if it did not finish."""
    text = f"{run.state} after {run.steps:,} steps in {duration(run.seconds)}"
    if run.state == FINISHED:
        return "; ".join(part for part in (text, evaluation_text(run)) if part)
    return f"{text}: {run.reason}" if run.reason else text


def progress_values(name: str, run: Run) -> dict[str, Any]:
    """Return the progress of a run as plain values."""
    line = live_line(run)
    last = None
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
        "seconds_left": line.remaining_seconds,
        "memory_bytes": line.memory or None,
        "planned_memory_bytes": line.planned,
        "evaluation": last,
    }


def _mean(run: Run, metric: str) -> str:
    line = live_line(run)
    return short(line.mean) if line.metric == metric and line.mean is not None else ""


WATCH_COLUMNS = (
    *(column for column in COLUMNS if column.title in ("state", "steps", "held-out", "score")),
    Column("loss", lambda run: _mean(run, "loss"), 1),
    Column("reward", lambda run: _mean(run, "reward"), 1),
    Column("tokens/s", lambda run: count(run.tokens_per_second) if run.seconds else "", 6),
    Column("left", lambda run: "" if (left := live_line(run).remaining_seconds) is None else clock(left), 2),
    Column("memory", lambda run: gigabytes(_memory(run)) if _memory(run) else "", 7),
)


class _LogLines:
    """Prints a line at intervals, for each evaluation, and at the end, without control characters."""

    def __init__(self, out: TerminalOutput) -> None:
        self.out = out
        self._last_line_times: dict[Path, float] = {}
        self._last_values: dict[object, object] = {}

    def show(self, runs: Mapping[str, Run], waiting: Mapping[str, str]) -> None:
        for name, line in waiting.items():
            if self._is_new(name, True):
                self.out.print_line(line)
        for name, run in runs.items():
            prefix = f"{name}: " if len(runs) > 1 else ""
            if run.state == RUNNING:
                self.progress(prefix, run)
            elif self._is_new((run.path, run.started), run.state):
                self.out.print_line(prefix + outcome_text(run))

    def _is_new(self, key: object, value: object) -> bool:
        previous = self._last_values.get(key)
        self._last_values[key] = value
        return previous != value

    def progress(self, prefix: str, run: Run) -> None:
        now = time.monotonic()
        is_new = self._is_new(run.path, evaluation_text(run))
        if is_new or now - self._last_line_times[run.path] >= NEXT_LINE:
            self._last_line_times[run.path] = now
            self.out.print_line(prefix + live_line(run).log_line(WIDTH - len(prefix)))
            if is_new and evaluation_text(run):
                self.out.print_line(f"{prefix}{evaluation_text(run)}")

    def close(self) -> None:
        """Restore the terminal."""


class _LiveTable(_LogLines):
    """Redraws the active runs in place. Runs that end are printed above."""

    def __init__(self, out: TerminalOutput) -> None:
        super().__init__(out)
        self._live = Live(Text(), console=out, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, runs: Mapping[str, Run], waiting: Mapping[str, str]) -> None:
        super().show(runs, waiting)
        active = [run for run in runs.values() if run.state == RUNNING]
        if len(runs) > 1:
            self._live.update(runs_table([*runs.values()], self.out.width, WATCH_COLUMNS), refresh=True)
        else:
            pairs = [(live_line(run), Text(evaluation_text(run), overflow="ellipsis")) for run in active]
            self._live.update(Group(*(line for pair in pairs for line in pair)), refresh=True)

    def progress(self, prefix: str, run: Run) -> None:
        """The live display contains the progress, so no line is printed."""

    def close(self) -> None:
        self._live.stop()


class _JSONValues(_LogLines):
    """Emits plain values of each run when anything but its memory has changed."""

    def __init__(self, out: TerminalOutput, emit: Emit) -> None:
        super().__init__(out)
        self._emit = emit

    def show(self, runs: Mapping[str, Run], waiting: Mapping[str, str]) -> None:
        super().show({}, waiting)
        for name, run in runs.items():
            values = progress_values(name, run)
            if self._is_new(run.path, {**values, "memory_bytes": None}):
                self._emit(values)
