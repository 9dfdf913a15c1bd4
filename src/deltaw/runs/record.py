"""Run records: the decision to start or resume, ``run.json`` and checkpoints, and the translation of errors."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deltaw.atomic_files import write_text
from deltaw.data.example import rows_of
from deltaw.errors import UserError, clean, first_line, first_names
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.methods.trust import read_run_settings
from deltaw.platforms import shell_word
from deltaw.progress import LogFunction
from deltaw.runs.checkpoints import Checkpoint, Checkpoints, JSONMap, Stateful, list_checkpoints, newest_checkpoint
from deltaw.runs.folder import (
    CHECKPOINT_FOLDER,
    DIVERGED,
    FAILED,
    FINISHED,
    INTERRUPTED,
    KILLED,
    RUNNING,
    Run,
    RunFolder,
    RunLock,
    mapping,
    nearby_runs_hint,
    process_identity,
)
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
from deltaw.runs.summary import choices_as_dict, describe_run, next_commands, to_plain
from deltaw.settings.config import SETTINGS, RunConfig, flat
from deltaw.tensor_files import save_tensors
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.features.store import FeatureRecord
from deltaw.training.parallel.group import LostProcess
from deltaw.training.session import Session
from deltaw.training.state import NotFinite, NotFiniteError, Outcome, SavedState, TrainState

if TYPE_CHECKING:
    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan

# Maximum number of row numbers in a message.
_MAX_ROWS = 12


class StepDiagnosis:
    """Finds the cause of a non-finite loss or gradient, and saves the rows of the step.

    The rows are run again with hooks on every module. The first non-finite parameter, module output, loss or gradient
    is reported.

    Args:
        session: Session within :meth:`Session.running`, in its state before the step.
        folder: Folder for the saved rows.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session, self._folder = session, folder

    def __call__(self, event: NotFinite) -> list[str]:
        """Return the lines that describe the failed step."""
        items = [self._session.data.train[index] for index in event.rows]
        rows = [row for item in items for row in rows_of(item)]
        try:
            lines = [self.first_nonfinite(items)]
        except Exception as error:  # must not hide the error of the step
            lines = [f"its rows could not be run again ({type(error).__name__}: {str(error)[:100]})"]
        numbers = ", ".join(str(row.row) for row in rows[:_MAX_ROWS]) + (", …" if len(rows) > _MAX_ROWS else "")
        lines.append(f"rows of the step: {numbers}")
        name = f"failed_step-{event.step:06d}"
        try:
            self._save(name, event, rows, lines)
        except OSError as error:
            return [*lines, f"they could not be saved: {error.strerror or error}"]
        return [*lines, f"saved as {name}.json and {name}.safetensors in {self._folder}"]

    def first_nonfinite(self, items: Sequence[Any]) -> str:
        """Run the rows and describe the first non-finite value."""
        session = self._session
        broken = [name for name, p in session.model.named_parameters() if not _is_finite(p)]
        if broken:
            return f"the weights were not finite before the step: {first_names([repr(name) for name in broken])}"
        units = session.objective.units(items)
        trained = [(name, p) for name, p in session.model.named_parameters() if p.requires_grad]
        for batch in session.batcher.batches(items):
            with _record_nonfinite_output(session.model) as first:
                loss = session.objective(batch)
            if first:
                return f"first not finite: the output of '{first[0]}'"
            if not _is_finite(loss):
                return "the outputs of all modules are finite, and the loss is not"
            gradients = torch.autograd.grad(loss / units, [p for _, p in trained], allow_unused=True)
            pairs = zip(trained, gradients, strict=True)
            failing = [name for (name, _), g in pairs if g is not None and not _is_finite(g)]
            if failing:
                # The backward pass computes gradients of the last layers first.
                count = f" ({len(failing)} of {len(trained)} parameters)" if len(failing) > 1 else ""
                return f"the loss is finite, but the gradient of '{failing[-1]}' is not{count}"
        return "each microbatch is finite when run again, so only their sum overflows"

    def _save(self, name: str, event: NotFinite, rows: Sequence[Any], lines: Sequence[str]) -> None:
        tensors: dict[str, Tensor] = {}
        for index, row in enumerate(rows):
            for key, value in _array_fields(row).items():
                tensors[f"{index}/{key}"] = torch.from_numpy(np.ascontiguousarray(value))
        save_tensors(self._folder / f"{name}.safetensors", tensors, {"format": "pt"})
        content = {
            "step": event.step,
            "loss": str(event.loss),
            "gradient_norm": str(event.gradient_norm),
            "learning_rate": event.learning_rate,
            "rows": [row.row for row in rows],
            "places": [int(index) for index in event.rows],
            "diagnosis": list(lines),
        }
        write_text(self._folder / f"{name}.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _record_nonfinite_output(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list that receives the name of the first module with a non-finite output."""
    first: list[str] = []

    def check_output(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not first and not all(_is_finite(t) for t in _tensors_in(output)):
            first.append(name)

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(functools.partial(check_output, name)) for name, module in named]
    try:
        yield first
    finally:
        for hook in hooks:
            hook.remove()


def _tensors_in(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, list | tuple) else ()
    return [tensor for value in inner for tensor in _tensors_in(value)]


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _array_fields(row: Any) -> dict[str, np.ndarray]:
    if not dataclasses.is_dataclass(row):
        return {}
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


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
    choices, before = checkpoint.values["choices"], checkpoint.values["settings"]
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


SUM_FIELDS = ("rows", "tokens", "computed_tokens", "label_tokens", "steps", "seconds")


@dataclass(frozen=True)
class Result:
    """Result of a run. ``as_dict`` is the output of ``train --json``.

    Attributes:
        seconds_by_part: Time of this process by part, such as ``training``, ``loading`` or ``evaluating``.
        generation: Verdict on greedy answers before and after training
            (:func:`deltaw.training.monitoring.generation.verdict_of`), empty if they were not compared.
        rewards_differed: False if the rewards never differed, so that they trained nothing. None without rewards.
        earlier: Stored result of a run that was already finished, else None.
    """

    output: Path
    outcome: Outcome
    evaluation: Evaluation
    peak_memory_bytes: int
    plan: Plan | None = None
    trained_parameters: int = 0
    method: str = ""
    task: str = ""
    generates_text: bool = True
    drift: Drift | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    approximations: Mapping[str, object] = field(default_factory=dict)
    best: Mapping[str, object] | None = None
    stopped_early: str | None = None
    rewards_differed: bool | None = None
    resumed_from_step: int | None = None
    checkpoints: Sequence[Path] = ()
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    earlier: Mapping[str, Any] | None = None

    @classmethod
    def of_finished(cls, run: Run) -> Result:
        """Return the stored result of a finished run, without plan and per-row values."""
        stored, score = run.result, mapping(run.result.get("score"))
        outcome = Outcome(**{name: stored[name] for name in SUM_FIELDS if name in stored})
        outcome.loss_sum = (stored.get("train_loss") or 0.0) * outcome.label_tokens
        metrics = mapping(stored.get("eval"))
        sets = metrics if any(isinstance(value, Mapping) for value in metrics.values()) else {"": metrics}
        main = str(score.get("metric", ""))
        results = [Evaluation(_numbers(values), main, name=name) for name, values in sets.items()]
        other_sets = {result.name: result for result in results[1:]}
        evaluation = replace(results[0], interval=tuple(score.get("interval") or ()) or None, other_sets=other_sets)
        drift: dict[str, Any] = {k: value for k, value in _numbers(stored.get("drift")).items() if k != "change"}
        names = ("trained_parameters", "best", "stopped_early", "resumed_from_step", "arithmetic", "approximations")
        fields = {n: stored[n] for n in (*names, "generation", "seconds_by_part") if stored.get(n) is not None}
        fields |= {"drift": Drift(**drift) if drift else None, "earlier": stored, "method": run.method}
        fields |= {"task": run.task, "generates_text": run.values.get("writes_text", True)}
        fields["checkpoints"] = list_checkpoints(run.path / CHECKPOINT_FOLDER)
        return cls(run.path, outcome, evaluation, run.peak_bytes or 0, **fields)

    @property
    def planned_memory_bytes(self) -> int | None:
        return None if self.plan is None else self.plan.peak_resident_bytes

    @property
    def planned_seconds(self) -> float | None:
        """Predicted duration of the run, including the measured time of planning. None if it was not predicted."""
        if self.plan is None or self.plan.seconds is None:
            return None
        return self.plan.seconds + self.seconds_by_part.get("planning", 0.0)

    @property
    def interrupted(self) -> bool:
        return self.outcome.interrupted

    def as_dict(self) -> dict[str, object]:
        outcome, seconds = self.outcome, self.outcome.seconds or math.inf
        values = {
            **{name: getattr(outcome, name) for name in SUM_FIELDS},
            "rows_per_second": outcome.rows / seconds,
            "tokens_per_second": outcome.tokens / seconds,
            "train_loss": outcome.loss if outcome.steps else None,
            "trained_parameters": self.trained_parameters,
            "eval": self.evaluation.as_dict() or None,
            "score": self.evaluation.score(),
            "best_step": None if self.best is None else self.best["step"],
            "best": self.best,
            "stopped_early": self.stopped_early,
            "rewards_differed": self.rewards_differed,
            "drift": None if self.drift is None else self.drift.as_dict(),
            "generation": dict(self.generation) or None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "planned_memory_bytes": self.planned_memory_bytes,
            "arithmetic": dict(self.arithmetic) or None,
            "approximations": dict(self.approximations),
            "interrupted": outcome.interrupted,
            "skipped_steps": outcome.skipped,
            "resumed_from_step": self.resumed_from_step,
            "seconds_by_part": dict(self.seconds_by_part),
            "total_seconds": sum(self.seconds_by_part.values()),
            "planned_seconds": self.planned_seconds,
            **(self.earlier or {}),
        }
        files = [os.fspath(path) for path in self.checkpoints]
        return {"output": os.fspath(self.output), **values, "checkpoints": files}


def _numbers(values: object) -> dict[str, float]:
    """Return numbers by name from JSON, with null as NaN."""
    return {name: math.nan if value is None else value for name, value in mapping(values).items()}


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
        self._start, self._session, self._folder, self._log = start, session, folder, log
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


_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would become larger than allowed",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk fails to read or write",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "a file or folder has disappeared",
    errno.ENODEV: "a device has disappeared",
    errno.ESTALE: "a network folder has disappeared",
}
# Messages of torch's CPU allocator if memory is exhausted, on Linux and on Windows, and of cuBLAS.
_OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "_ALLOC_FAILED")


@contextlib.contextmanager
def translate_errors(run: Path, *, location: Callable[[], str], last: Callable[[], Path | None]) -> Iterator[None]:
    """Translate out-of-memory and disk errors into a UserError with instructions.

    Args:
        run: Folder that is written to.
        location: Returns the current position in the training.
        last: Returns the newest checkpoint, or None.

    Raises:
        UserError: If memory or disk space is exhausted, or a file has disappeared.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        hint = "lower train.tokens_per_pass, set train.checkpointing: true, or train fewer parameters"
        name = "machine"
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS" in str(error):
            name, hint = "card", f"set memory to less than the card has, such as 20GB, {hint}"
        message = f"the {name} is out of memory: {first_line(error)}"
        raise UserError(message, location=location(), hint=f"{hint}; {_resume_hint(last())}") from error
    except (OSError, SafetensorError) as error:
        if (problem := _disk_error(error)) is None:
            raise
        file = getattr(error, "filename", None)
        hint = f"make it writable and free some space; {_resume_hint(last())}"
        raise UserError(f"{problem}, so the run cannot continue", location=str(file or run), hint=hint) from error


def _resume_hint(last: Path | None) -> str:
    if last is None:
        return "the run has no checkpoint yet and will start over"
    return f"repeat the command to resume from {last.name}"


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _OUT_OF_MEMORY_MESSAGES)


def _disk_error(error: Exception) -> str | None:
    """Return the meaning of a disk error, or None for other errors."""
    if isinstance(error, OSError):
        return _DISK_ERRORS.get(error.errno or 0)
    number = str(error).rpartition("os error ")[2].partition(")")[0]  # format of safetensors
    return _DISK_ERRORS.get(int(number)) if number.isdigit() else None
