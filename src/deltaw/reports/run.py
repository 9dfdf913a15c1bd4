"""A run that leaves its page: :func:`deltaw.runs.fit.fit` with ``report.html`` written on the way.

This is what the command line and ``deltaw.fit`` call; training itself knows no reports. A page that cannot be
written is told, and the run goes on.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaw.platforms import shell_word
from deltaw.reports.page.write import write_page
from deltaw.reports.wording import count, metric_name, metric_value, when
from deltaw.runs.fit import Decoding, Result
from deltaw.runs.fit import fit as train
from deltaw.runs.folder import Run, number
from deltaw.serving.opening import verified_writer
from deltaw.serving.rollouts import SessionSampler
from deltaw.settings import SETTINGS, RunConfig
from deltaw.training.callbacks import Callback, Callbacks, RunStart
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.parallel.reducer import ALONE, Reducer
from deltaw.training.state import Step
from deltaw.working import working

# Seconds between two pages of a run that is not evaluated meanwhile.
INTERVAL = 120.0
# A page takes at most this share of the time: after one that took long, the next one waits longer.
SHARE = 0.01

# What writes texts during a training.
ENGINE = Decoding(verified_writer, SessionSampler)


class PageCallback(Callback):
    """Writes a run's page when it is evaluated, at intervals, and once it is over.

    Args:
        tell: told in one line where a page cannot be written, once.
        clock: seconds; a test has its own.
    """

    def __init__(self, tell: Callback, clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
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
        """Write the last page, if the run has a folder. Called once all other files are there."""
        if self._folder is not None:
            self._write()

    def _write(self) -> None:
        assert self._folder is not None
        begun = self._clock()
        try:
            with working("writing the page"):
                write_page(self._folder)
        except Exception as error:  # whatever is wrong with a page, it must not end the training
            if not self._failed:
                brief = (str(error).splitlines() or [""])[0]
                self._tell.on_line(f"report.html: not written ({type(error).__name__}: {brief[:160]})")
            self._failed = True
        took = self._clock() - begun
        self._not_before = self._clock() + took / SHARE
        self._next = max(self._clock() + INTERVAL, self._not_before)


def finished_lines(result: Result, settings: str | None) -> Iterator[str]:
    """What to say of a run that was finished before, so that nothing was trained.

    Args:
        settings: the file that the command names; None where flags stand beside it.
    """
    run, output = Run(result.output), shell_word(result.output)
    score = f", {metric_name(run.score[0])} {metric_value(*run.score)}" if run.score else ""
    ended = when(number(run.values.get("ended")) or run.changed)
    yield f"{result.output} is finished: {ended}, {count(result.outcome.steps)} steps{score}"
    yield "nothing is trained again; what would train:"
    train = RunConfig.read(run.path / SETTINGS).train
    longer = f"--train.epochs {math.floor(train.epochs) + 1}"
    if train.max_steps is not None:
        longer = f"--train.max_steps {2 * train.max_steps}"
    elif train.time is not None and max(run.metrics.column("epoch")[1], default=0.0) < train.epochs:
        longer = "--train.time LONGER"
    if result.checkpoints and (train.early_stopping is None or not result.stopped_early):
        yield f"next: deltaw train --resume {output} {longer}  # train further"
    again = "the same command with" if settings is None else f"deltaw train {shell_word(settings)}"
    yield f"next: {again} --fresh  # start anew; moves {result.output}"
    yield f"next: {again} --output OTHER  # start anew elsewhere"


def fit(
    config: RunConfig | Mapping | str | os.PathLike[str] | None = None,
    *,
    callback: Callback | None = None,
    resume: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    processes: Reducer = ALONE,
) -> Result:
    """Train as ``config`` says and write the run's folder, with a page about the run in it.

    A run in the same folder that was not done goes on from its last checkpoint; one that was is left as it is, and
    the result is what it came to. The process is left as it was: its threads, random numbers, signal handlers and
    garbage collector.

    Args:
        config: settings, a dictionary of them, or the path of a YAML file.
        callback: told of everything on the way; without one, the run is silent.
        resume: the folder of a run that goes on with its own settings, even if it was done; ``config`` is
            then a dictionary of settings that change, or None.
        fresh: begin with the first step, whatever is in the folder; it is moved.
        processes: that train together, of which this is process 0.

    Raises:
        UserError: something the user gave cannot be used; nothing was written then. Or the machine has no
            memory or no room on the disk, or the training diverged: what was trained before is kept.
        UntrainedParameterError: a parameter that the settings name is not trained; no adapter is written.
    """
    told = callback or Callback()
    page = PageCallback(told)
    try:
        how: dict[str, Any] = {"resume": resume, "fresh": fresh, "processes": processes}
        return train(config, callback=Callbacks(told, page), decoding=ENGINE, **how)
    finally:
        page.close()
