"""Run a training: from settings to a folder with an adapter.

:func:`fit` lists the steps, and :class:`deltaw.runs.training_run.TrainingRun` is the state that they share. Nothing is
printed: events go to a :class:`deltaw.training.callbacks.Callback`, and to the default callbacks, which write the
report.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.methods.start import resolve_start
from deltaw.progress import LogFunction
from deltaw.runs.checks import check_settings, check_start_folders
from deltaw.runs.decision import Decision, decide_and_lock, settings_to_resume
from deltaw.runs.folder import Run, check_output
from deltaw.runs.result import Result
from deltaw.runs.tracking import tracked
from deltaw.runs.training_run import TrainingRun
from deltaw.settings import registry
from deltaw.settings.config import RunConfig
from deltaw.settings.registry import import_object
from deltaw.training.callbacks import Callback, Callbacks
from deltaw.training.parallel.joining import require_single_process
from deltaw.training.process import preserved_process_state
from deltaw.training.reducer import SINGLE_PROCESS, Reducer


def fit(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    callback: Callback | None = None,
    resume: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    processes: Reducer = SINGLE_PROCESS,
) -> Result:
    """Train with the given settings and write the run's folder, including its report.

    An unfinished run in the same folder is resumed from its last checkpoint. A finished run is left unchanged, and its
    result is returned. Global state (threads, random number generators, signal handlers, garbage collector) is restored
    on return.

    Args:
        config: Settings, a dictionary of settings, or the path of a YAML file.
        callback: Receives all events of the run. Without a callback, the run is silent.
        resume: Folder of a run to continue with its stored settings, even if it is finished. ``config`` is then a
            dictionary of changed settings, or None.
        fresh: Start over. An existing run in the folder is moved.
        processes: Communication with the other processes of a distributed run. This is process 0.

    Raises:
        UserError: If an argument cannot be used; no files are written in this case. Also if memory or disk space is
            insufficient, or if the training diverged; everything trained before is saved.
        UntrainedParameterError: If a parameter in the settings is not trained. No adapter is written.
    """
    with _with_default_callbacks(callback or Callback()) as callbacks:
        settings = _requested_settings(config, resume, fresh, callbacks.on_line)
        if processes is SINGLE_PROCESS:
            require_single_process()
        with preserved_process_state(), tracked(settings, callbacks) as run_callback:
            start = _decide(settings, resume=resume is not None, fresh=fresh, log=run_callback.on_line)
            with start.locked():
                return _run(TrainingRun(start, run_callback, processes))


def _run(run: TrainingRun) -> Result:
    run.divide_processors()
    run.read_rows()
    if run.is_finished:
        return run.stored_result()
    run.plan_memory()
    run.load_model()
    run.assemble_session()
    run.open_folder()
    with run.errors_recorded():
        run.write_inputs()
        run.choose_learning_rate()
        run.announce()
        run.measure_base()
        run.train()
        run.measure_adapter()
        run.finish()
    return run.result()


@contextlib.contextmanager
def _with_default_callbacks(callback: Callback) -> Iterator[Callback]:
    """Yield a callback that forwards events to ``callback`` and to the default callbacks, and close these."""
    defaults = [import_object(name)(callback) for name in registry.default_callbacks]
    try:
        yield Callbacks(callback, *defaults)
    finally:
        for default in defaults:
            default.close()


def _requested_settings(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    fresh: bool,
    log: LogFunction,
) -> RunConfig:
    """Return the settings of the user. The stored settings of a resumed run are overridden by ``config``."""
    if resume is not None:
        if fresh or not (config is None or isinstance(config, Mapping)) or "output" in (config or {}):
            hint = "pass only the settings to change: no settings file, no 'output', no fresh"
            raise UserError("a resumed run uses its stored settings and folder", location=str(resume), hint=hint)
        changes = {**(config or {}), "output": os.fspath(resume)}
        config = settings_to_resume(Path(os.path.expanduser(resume)), changes)
    return resolve_start(RunConfig.read(config), log)


def _decide(settings: RunConfig, *, resume: bool, fresh: bool, log: LogFunction) -> Decision:
    """Check the settings, and decide to start a new run or to resume the one in the output folder."""
    output = Path(os.path.expanduser(settings.output))
    check_settings(settings)
    check_start_folders(settings, output)
    check_output(output, is_resumed=not fresh and (resume or Run(output).training is not None))
    return decide_and_lock(output, settings, resume=resume, fresh=fresh, log=log)
