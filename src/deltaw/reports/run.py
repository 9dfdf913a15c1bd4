"""The report of a run: a callback that writes ``report.html`` during and after the run.

A page that cannot be written does not stop the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deltaw.platforms import shell_word
from deltaw.progress import track_progress
from deltaw.reports.page.write import write_page
from deltaw.reports.tables import count, format_time, metric_name, metric_value
from deltaw.runs.folder import Run, number
from deltaw.runs.result import Result
from deltaw.settings.config import SETTINGS, RunConfig
from deltaw.training.callbacks import Callback, RunStart
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.state import Step

# Seconds between two updates of the page of a run without evaluations.
INTERVAL = 120.0
# Maximum share of the time spent on pages. A slow page increases the interval to the next one.
MAX_TIME_SHARE = 0.01


class PageCallback(Callback):
    """Write a run's page after evaluations, at intervals, and at the end.

    Args:
        log: Receives one line if a page cannot be written, once per run.
        clock: Returns the time in seconds.
    """

    def __init__(self, log: Callback, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._folder: Path | None = None
        self._not_before = 0.0
        self._next = 0.0
        self._failed = False

    def on_start(self, start: RunStart) -> None:
        self._folder = start.folder
        self._next = self._clock() + INTERVAL

    def on_step(self, step: Step) -> None:
        if self._clock() >= self._next:
            self._write()

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if self._clock() >= self._not_before:
            self._write()

    def close(self) -> None:
        """Write the last page if the run has a folder. Call this after all other files have been written."""
        if self._folder is not None:
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        start = self._clock()
        try:
            with track_progress("writing the page"):
                write_page(self._folder)
        except Exception as error:  # an error in the report must not stop the training
            if not self._failed:
                brief = (str(error).splitlines() or [""])[0]
                self._log.on_line(f"report.html: not written ({type(error).__name__}: {brief[:160]})")
            self._failed = True
        elapsed = self._clock() - start
        self._not_before = self._clock() + elapsed / MAX_TIME_SHARE
        self._next = max(self._clock() + INTERVAL, self._not_before)


def finished_lines(result: Result, settings: str | None) -> Iterator[str]:
    """Yield the lines to print for a run that is already finished, so that no training takes place.

    Args:
        settings: Settings file of the command, or None if the command also has flags.
    """
    run = Run(result.output)
    output = shell_word(result.output)
    score = f", {metric_name(run.score[0])} {metric_value(*run.score)}" if run.score else ""
    end_time = format_time(number(run.values.get("ended")) or run.changed)
    yield f"{result.output} is finished: {end_time}, {count(result.outcome.steps)} steps{score}"
    yield "the existing run is left unchanged; to train:"
    train = RunConfig.read(run.path / SETTINGS).train
    longer = f"--train.epochs {math.floor(train.epochs) + 1}"
    if train.max_steps is not None:
        longer = f"--train.max_steps {2 * train.max_steps}"
    elif train.time is not None and max(run.metrics.column("epoch")[1], default=0.0) < train.epochs:
        longer = "--train.time LONGER"
    if result.checkpoints and (train.early_stopping is None or not result.stopped_early):
        yield f"next: deltaw train --resume {output} {longer}  # train further"
    again = "the same command with" if settings is None else f"deltaw train {shell_word(settings)}"
    yield f"next: {again} --fresh  # start over; moves {result.output}"
    yield f"next: {again} --output OTHER  # start over in another folder"
