"""Decision to start a new run, to resume a run, or to return the result of a finished one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaw.errors import UserError
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.methods.trust import read_run_settings
from deltaw.platforms import shell_word
from deltaw.progress import LogFunction
from deltaw.runs.checkpoints import Checkpoint, list_checkpoints, newest_checkpoint
from deltaw.runs.folder import CHECKPOINT_FOLDER, DIVERGED, FINISHED, KILLED, RUNNING, Run, RunLock, nearby_runs_hint
from deltaw.runs.resuming import (
    LENGTH_KEYS,
    ROUNDING_KEYS,
    SettingChange,
    apply_choices,
    changed_settings,
    changed_settings_error,
    disallowed_changes,
    dump_settings,
    require_same_result,
)
from deltaw.settings.config import SETTINGS, RunConfig, flat


@dataclass
class Decision:
    """Decision to start a new run, to resume a run, or to return the result of a finished one.

    Attributes:
        requested: Settings as given by the user.
        config: Settings to run with, including automatic choices of the resumed run.
        is_resumed: True if the run in the folder is resumed.
        checkpoint: Checkpoint to resume from, or None to start from the first step.
        run: The existing run.
        length_changed: True if the training length was changed.
        is_finished: True if the run in the folder is finished, so that no training takes place.
        lock: Lock of the folder, if it existed.
        choices: Automatic choices of the resumed run by key.
    """

    requested: RunConfig
    config: RunConfig
    is_resumed: bool = False
    checkpoint: Checkpoint | None = None
    run: Run | None = None
    length_changed: bool = False
    is_finished: bool = False
    lock: RunLock | None = None
    choices: Mapping[str, object] = field(default_factory=dict)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Context after which the lock of the folder is released."""
        try:
            yield
        finally:
            if self.lock is not None:
                self.lock.release()

    @property
    def step(self) -> int | None:
        """Step of the checkpoint to resume from, or None."""
        return None if self.checkpoint is None else self.checkpoint.step

    @property
    def resumes_finished(self) -> bool:
        """True if the resumed run was finished."""
        return self.run is not None and self.run.state == FINISHED

    @property
    def training(self) -> Mapping[str, Any]:
        """Training section of the existing run's ``run.json``, empty for a new run."""
        return {} if self.run is None else self.run.training or {}

    @property
    def rows(self) -> Mapping[str, Any] | None:
        """Row digests of the existing run, or None if the rows need not match."""
        recorded: Mapping[str, Any] | None = None if self.checkpoint is None else self.checkpoint.values["rows"]
        return self.training.get("rows", recorded) if self.is_finished else recorded

    @property
    def num_metrics_lines(self) -> int:
        """Number of metrics lines to keep."""
        if self.checkpoint is None:
            return 0
        return int((self.finish_record or {"lines": self.checkpoint.values["metrics_lines"]})["lines"])

    @property
    def finish_record(self) -> Mapping[str, Any] | None:
        """Record of the end of the run if it was finished at the step of the checkpoint, else None."""
        recorded: Mapping[str, Any] | None = self.training.get("finished")
        return recorded if recorded is not None and recorded["steps"] == self.step else None

    def settings_to_write(self, config: RunConfig) -> RunConfig:
        """Return the user's settings with the activation checkpointing that ``memory`` selected."""
        train = self.requested.train.model_copy(update={"checkpointing": config.train.checkpointing})
        return self.requested.model_copy(update={"train": train})

    def initial_choices(self) -> dict[str, tuple[object, str]]:
        """Return the choices of the resumed run for settings that the user left open."""
        open_keys = {k for k, v in flat(dump_settings(self.requested)).items() if v in ("auto", "search", None)}
        return {k: (v, "as at the start of the run") for k, v in self.choices.items() if k in open_keys}

    def check_length(self, total_steps: int) -> None:
        """Check that the run has steps left to train.

        Raises:
            UserError: If the checkpoint is at or beyond the last step.
        """
        if self.checkpoint is None or self.checkpoint.step < total_steps:
            return
        if self.checkpoint.step == total_steps and not self.resumes_finished:
            return  # the run was stopped during its last evaluation
        message = f"the run has done {self.checkpoint.step} steps, and the settings request {total_steps}"
        hint = "increase --train.epochs or --train.max_steps"
        raise UserError(message, location=str(self.checkpoint.path.parent.parent), hint=hint)


def settings_to_resume(run: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """Return the settings of an existing run, overridden by ``overrides``.

    Raises:
        UserError: If the run does not exist, or its settings need a permission from the caller.
    """
    if not (run / SETTINGS).is_file():
        raise UserError("there is no run to resume", location=str(run), hint=nearby_runs_hint(run))
    return read_run_settings(run, overrides, resume=True)


def decide_and_lock(output: Path, config: RunConfig, *, resume: bool, fresh: bool, log: LogFunction) -> Decision:
    """Decide if a run in ``output`` is new, resumed or finished, and lock the folder if it exists.

    Args:
        config: Settings of the user.
        resume: The user explicitly resumes the run.
        fresh: The user starts over.

    Raises:
        UserError: If the folder is in use, or its run cannot be resumed with these settings.
    """
    if not (output / CHECKPOINT_FOLDER).is_dir():
        if resume:
            raise _no_checkpoint_error(Run(output))
        return Decision(config, config)
    lock = RunLock(output)
    try:
        start = Decision(config, config) if fresh else decide_start(output, config, resume, log)
    except BaseException:
        lock.release()
        raise
    start.lock = lock
    return start


def decide_start(output: Path, config: RunConfig, resume: bool, log: LogFunction) -> Decision:
    """Decide whether a run resumes the one in ``output``, without locking the folder.

    Raises:
        UserError: If the run in the folder cannot be resumed with these settings.
    """
    run = Run(output)
    if run.training is None:
        if resume:
            raise _no_checkpoint_error(run)
        return Decision(config, config)
    checkpoint, damaged = newest_checkpoint(output / CHECKPOINT_FOLDER)
    for path, reason in damaged:
        log(f"{path.name} is damaged and was skipped: {reason}")
    if run.state == FINISHED and not resume:
        require_same_result(run, config, log)
        return Decision(config, config, checkpoint=checkpoint, run=run, is_finished=True)
    if checkpoint is None:
        return _start_from_first_step(run, config, resume, log)
    choices = checkpoint.values["choices"]
    before = checkpoint.values["settings"]
    differing = changed_settings(before, config, choices)
    disallowed = disallowed_changes(differing, resume=resume)
    position = f"step {checkpoint.step} of {run.total_steps}"
    if disallowed and run.state == DIVERGED and not resume:
        return Decision(config, config)  # a diverged run is started over with the changed settings
    if disallowed:
        raise changed_settings_error(output, position, disallowed, resume=resume)
    length_changed = any(change.key in LENGTH_KEYS for change in differing)
    if length_changed:  # invalidates the number of steps that was planned for a time budget
        choices = {key: value for key, value in choices.items() if key not in LENGTH_KEYS}
    if any(change.key == "memory" for change in differing):  # microbatches are chosen again
        choices = {key: value for key, value in choices.items() if key != "train.tokens_per_pass"}
    resumed, messages = apply_choices(config, before, choices)
    log(f"the run in {output} resumes from {position} ({checkpoint.path.name})")
    for line in [*messages, *_rounding_lines(differing)]:
        log(line)
    return Decision(
        config, resumed, is_resumed=True, checkpoint=checkpoint, run=run, length_changed=length_changed, choices=choices
    )


def _start_from_first_step(run: Run, config: RunConfig, resume: bool, log: LogFunction) -> Decision:
    """Start a run without a complete checkpoint over, in the same folder if no result would be lost."""
    output = run.path
    if resume or run.training is None:
        raise _no_checkpoint_error(run)
    disallowed = disallowed_changes(changed_settings(run.training["settings"], config), resume=False)
    if disallowed or (output / ADAPTER_CONFIG).exists():
        return Decision(config, config)
    status = "no complete checkpoint" if list_checkpoints(output / CHECKPOINT_FOLDER) else "no checkpoint yet"
    log(f"the run in {output} was stopped and has {status}: it starts over at its first step")
    return Decision(config, config, is_resumed=True, run=run)


def _rounding_lines(differing: list[SettingChange]) -> list[str]:
    """Return messages about changes that affect the rounding of later steps."""
    return [f"{change}: later steps are rounded differently" for change in differing if change.key in ROUNDING_KEYS]


def _no_checkpoint_error(run: Run) -> UserError:
    """Return the error for a run without a checkpoint to resume from."""
    intervals = [run.setting(f"train.{key}") for key in ("checkpoint_every", "checkpoint_minutes")]
    if list_checkpoints(run.path / CHECKPOINT_FOLDER):
        reason = "its checkpoints are damaged"
    elif run.settings and intervals == [None, None]:
        reason = "train.checkpoint_every and train.checkpoint_minutes are null in its settings"
    elif run.training is not None and run.state != FINISHED:
        state = KILLED if run.state == RUNNING else run.state  # this process has the lock, so it is not running
        reason = f"the run ended before its first one ({state} after {run.steps:,} steps)"
    else:
        reason = "the run stored none, as in a comparison"
    hint = f"start over: deltaw train {shell_word(str(run.path / SETTINGS))} --fresh"
    return UserError(f"there is no checkpoint to resume from:\n  {reason}", location=str(run.path), hint=hint)
