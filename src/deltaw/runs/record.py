"""Run records: the decision to start or resume, ``run.json`` and checkpoints, and the translation of errors."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltaw.errors import UserError, clean
from deltaw.progress import LogFunction
from deltaw.runs.checkpoints import Checkpoints, JSONMap, Stateful
from deltaw.runs.decision import Decision
from deltaw.runs.diagnosis import StepDiagnosis
from deltaw.runs.folder import (
    CHECKPOINT_FOLDER,
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    RUNNING,
    RunFolder,
    process_identity,
)
from deltaw.runs.result import Result
from deltaw.runs.resuming import dump_settings
from deltaw.runs.summary import choices_as_dict, describe_run, next_commands, to_plain
from deltaw.training.features.feature_record import FeatureRecord
from deltaw.training.parallel.group import LostProcess
from deltaw.training.session import Session
from deltaw.training.state import NotFinite, NotFiniteError, Outcome, SavedState, TrainState

if TYPE_CHECKING:
    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan


class RunRecord:
    """Updates ``run.json`` and the checkpoints during a run. The run's folder must exist.

    Args:
        rows: Row digests (:func:`deltaw.runs.resuming.row_digests`).
        choices: Automatic choices (:func:`deltaw.runs.resuming.run_choices`).
        log: Receives messages for the user.

    Attributes:
        checkpoints: Checkpoints of the run.
        extras: Additional state stored with every checkpoint, by name. Must be filled before :meth:`restore`.
    """

    def __init__(
        self, start: Decision, session: Session, folder: RunFolder, *, rows: JSONMap, choices: JSONMap, log: LogFunction
    ) -> None:
        settings = session.config.train
        self._start = start
        self._session = session
        self._folder = folder
        self._log = log
        self._state: TrainState | None = None
        self._settings = dump_settings(start.requested)
        choice = session.chosen.get("train.keep_features")
        features = FeatureRecord(session.feed.store, "off" if choice is None else str(choice.value), log)
        self.extras: dict[str, Stateful] = {"features": features}
        self._features: Mapping[str, Any] = features.state()
        if start.is_resumed:
            self._features = start.training["features"]
            if start.checkpoint is None:
                features.restore(self._features)
        common: dict[str, object] = {"settings": self._settings, "choices": dict(choices)}
        common |= {"rows": dict(rows), "model": session.identity}
        common |= {"start": None if session.start is None else session.start.fingerprint}
        self.checkpoints = Checkpoints(
            folder.path / CHECKPOINT_FOLDER,
            every=settings.checkpoint_every,
            minutes=settings.checkpoint_minutes,
            num_latest=settings.keep_checkpoints,
            common_values=common,
            extras=self.extras,
            sync=folder.sync_metrics,
        )
        self._write(RUNNING, {"process": process_identity(), "ended": None})

    def describe(self, plan: Plan | None, chosen: Mapping[str, Choice[Any]], limit: int) -> None:
        """Record the description of the run before the first step (:func:`deltaw.runs.summary.describe_run`)."""
        self._folder.note(describe_run(self._session, plan, chosen, limit))

    def add(self, name: str, extra: Stateful, *, durable: Callable[[], None]) -> None:
        """Store additional state with every checkpoint. Call this before :meth:`restore`.

        Args:
            durable: Called between two steps when a checkpoint has been flushed to disk.
        """
        self.extras[name] = extra
        self.checkpoints.durable = durable

    def update_choices(self, choices: Mapping[str, object]) -> None:
        """Update the automatic choices that are stored in checkpoints."""
        self.checkpoints.common_values["choices"] = dict(choices)

    @property
    def saved(self) -> SavedState | None:
        """State to resume from, or None to start from the first step."""
        checkpoint = self._start.checkpoint
        if checkpoint is None:
            return None
        saved = SavedState(checkpoint.values["training"], checkpoint.tensors)
        return saved.with_total_steps(self._session.total_steps) if self._start.length_changed else saved

    def restore(self) -> None:
        """Delete incomplete files of killed processes and restore the additional state."""
        self.checkpoints.clear(after=self._start.step or 0)
        checkpoint = self._start.checkpoint
        if checkpoint is None:
            return
        finished = self._start.finish_record
        if finished is not None:  # includes the evaluation after the last step
            checkpoint = replace(checkpoint, values=checkpoint.values | {k: finished[k] for k in ("best", "extras")})
        self.checkpoints.resume_from(checkpoint)

    def start(self, state: TrainState) -> None:
        """Prepare for the first step."""
        self._state = state
        self.checkpoints.start(state)
        if self._start.length_changed and self._start.checkpoint is not None:
            rate = f"the learning rate continues at {state.learning_rate:.3g}, as in a run of this length"
            self._log(f"the run now has {state.total_steps} steps; {rate}")

    def diagnose(self, event: NotFinite) -> Sequence[str]:
        """Write a checkpoint of the last valid step, then diagnose the failed one."""
        lines = []
        try:
            self.checkpoints.write()
        except UserError as error:
            lines.append(error.message)
        return [*lines, *StepDiagnosis(self._session, self._folder.path)(event)]

    def position(self) -> str:
        """Return the current position in the training as text."""
        state = self._state
        return "before the first step" if state is None else f"step {state.step + 1} of {state.total_steps}"

    def done(self, outcome: Outcome) -> None:
        """Record the end of the run.

        Raises:
            UserError, OSError: If it cannot be written.
        """
        self._write(INTERRUPTED if outcome.interrupted else FINISHED, {})

    def record_result(self, result: Result) -> Result:
        """Record the result of a finished run and return it. A failure to write it is only a warning."""
        values: dict[str, Any] = {"result": to_plain(result.as_dict())}
        if not result.interrupted and result.stopped_early is None:  # a time budget changes the planned steps
            values["total_steps"] = result.outcome.steps
        try:
            self._folder.note(self._at_the_end(INTERRUPTED if result.interrupted else FINISHED) | values)
        except (OSError, UserError) as error:
            warnings.warn(f"the result could not be written: {error}", stacklevel=2)
        return result

    def failed(self, error: BaseException) -> None:
        """Record an error of the run. The caller raises it afterwards."""
        if isinstance(error, LostProcess):
            self._save_completed_steps()
        state = {NotFiniteError: DIVERGED, KeyboardInterrupt: INTERRUPTED}.get(type(error), FAILED)
        try:
            self.checkpoints.close()
        except UserError as write_error:
            self._log(write_error.message)
        values: dict[str, Any] = {}
        if isinstance(error, UserError):
            values = {"error": to_plain({"what": error.message, "where": error.location, "hint": error.hint})}
        elif state == FAILED:
            values = {"error": to_plain({"what": clean(f"{type(error).__name__}: {error}")})}
        try:
            self._write(state, self._at_the_end(state) | values)
        except (UserError, OSError) as write_error:
            self._log(f"the run's state could not be written: {write_error}")

    def _save_completed_steps(self) -> None:
        """Write a checkpoint of the last completed step after another process was lost."""
        try:
            self.checkpoints.write()
            self.checkpoints.check(until_durable=True)
        except (UserError, OSError) as write_error:
            self._log(f"no checkpoint could be written: {write_error}")
            return
        if (last := self.checkpoints.last) is not None:
            self._log(f"all completed steps are in {last}: repeat the command to resume there")

    def _at_the_end(self, state: str) -> dict[str, Any]:
        """Return the end time, the choices and notes during the run, and suggested commands.

        Only the end time is returned if the run has not been described yet.
        """
        end_time: dict[str, Any] = {"ended": time.time()}
        recorded = self._folder.values
        if "chosen" not in recorded:
            return end_time
        chosen = {**recorded["chosen"], **choices_as_dict(self._session.chosen)}
        method, task, generates_text = (recorded[name] for name in ("method", "task", "writes_text"))
        commands = next_commands(self._folder.path, state, method, task, generates_text=generates_text)
        notes = list(self._session.notes)
        return {**end_time, "chosen": to_plain(chosen), "notes": notes, "commands": commands}

    def _write(self, state: str, values: Mapping[str, object]) -> None:
        steps = (self._start.step or 0) if self._state is None else self._state.step
        finished = self._start.training.get("finished")
        if state == FINISHED:
            finished = {"steps": steps, "lines": self._folder.sync_metrics(), **self.checkpoints.extra_state()}
        training = {"steps": steps, "settings": self._settings, "features": self._features, "finished": finished}
        training["rows"] = self.checkpoints.common_values["rows"]
        total = {} if "total_steps" in self._folder.values else {"total_steps": self._session.total_steps}
        self._folder.note({"state": state, "training": training, **total, **values})
