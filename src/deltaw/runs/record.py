"""How a run begins, what it records of itself so that it can be resumed, and how it ends.

It knows a session, a folder and checkpoints; not the training's steps.
"""

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
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from deltaw.data.example import rows_of
from deltaw.durable import write_text
from deltaw.errors import UserError, clean, first_line, first_names
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.platforms import shell_word
from deltaw.runs.checkpoints import Checkpoint, Checkpoints, Stateful, listed, newest
from deltaw.runs.folder import (
    DIVERGED,
    FAILED,
    FINISHED,
    FOLDER,
    INTERRUPTED,
    KILLED,
    RUNNING,
    SETTINGS,
    Run,
    RunFolder,
    RunLock,
    mapping,
    runs_near,
    this_process,
)
from deltaw.runs.resuming import (
    LENGTH,
    ROUNDING,
    Change,
    changes,
    dumped,
    refusal,
    refused,
    require_same_result,
    with_choices,
)
from deltaw.runs.summary import facts, next_commands, plain, told_choices
from deltaw.settings import RunConfig, flat
from deltaw.tensor_files import save_tensors
from deltaw.training.callbacks import Say
from deltaw.training.drift import Drift
from deltaw.training.evaluation.base import Evaluation
from deltaw.training.features.store import FeatureRecord
from deltaw.training.origin import settings_in
from deltaw.training.parallel.group import LostProcess
from deltaw.training.session import Session
from deltaw.training.state import NotFinite, NotFiniteError, Outcome, SavedState, TrainState

if TYPE_CHECKING:
    from deltaw.machine.choices import Choice
    from deltaw.memory.plan import Plan

Facts: TypeAlias = Mapping[str, object]
# Row numbers that a line shows.
_SHOWN = 12


class Diagnosis:
    """Finds out where numbers stop being finite in a step, and saves its rows.

    The rows are run again while every module is watched. What is found first is named: a parameter, a module's
    output, the loss, or a parameter's gradient.

    Args:
        session: within :meth:`Session.running`, as it was before the step.
        folder: that the rows are saved in.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder

    def __call__(self, found: NotFinite) -> list[str]:
        """What is known of the step, in lines."""
        items = [self._session.data.train[place] for place in found.rows]
        rows = [row for item in items for row in rows_of(item)]
        try:
            lines = [self.first_place(items)]
        except Exception as error:  # whatever a model in this state raises; the step's own error comes first
            lines = [f"its rows could not be run again ({type(error).__name__}: {str(error)[:100]})"]
        shown = ", ".join(str(row.row) for row in rows[:_SHOWN]) + (", …" if len(rows) > _SHOWN else "")
        lines.append(f"rows of the step: {shown}")
        name = f"failed_step-{found.step:06d}"
        try:
            self._save(name, found, rows, lines)
        except OSError as error:
            return [*lines, f"they could not be saved: {error.strerror or error}"]
        return [*lines, f"saved as {name}.json and {name}.safetensors in {self._folder}"]

    def first_place(self, items: Sequence[Any]) -> str:
        """The first thing that is not finite when these rows are run, in words."""
        session = self._session
        broken = [name for name, p in session.model.named_parameters() if not _finite(p)]
        if broken:
            return f"the weights were not finite before the step: {first_names([repr(name) for name in broken])}"
        units = session.objective.units(items)
        trained = [(name, p) for name, p in session.model.named_parameters() if p.requires_grad]
        for batch in session.batcher.batches(items):
            with _watched(session.model) as first:
                loss = session.objective(batch)
            if first:
                return f"first not finite: the output of '{first[0]}'"
            if not _finite(loss):
                return "the outputs of all modules are finite, and the loss is not"
            gradients = torch.autograd.grad(loss / units, [p for _, p in trained], allow_unused=True)
            found = zip(trained, gradients, strict=True)
            failing = [name for (name, _), g in found if g is not None and not _finite(g)]
            if failing:
                # A backward comes to the last layers first.
                return f"the loss is finite, and not the gradient, first of '{failing[-1]}'" + (
                    f" ({len(failing)} of {len(trained)} parameters)" if len(failing) > 1 else ""
                )
        return "run again, the rows give finite numbers: they are too large only when added up"

    def _save(self, name: str, found: NotFinite, rows: Sequence[Any], lines: Sequence[str]) -> None:
        tensors: dict[str, Tensor] = {}
        for place, row in enumerate(rows):
            for key, value in _arrays_of(row).items():
                tensors[f"{place}/{key}"] = torch.from_numpy(np.ascontiguousarray(value))
        save_tensors(self._folder / f"{name}.safetensors", tensors, {"format": "pt"})
        facts = {
            "step": found.step,
            "loss": str(found.loss),
            "gradient_norm": str(found.gradient_norm),
            "learning_rate": found.learning_rate,
            "rows": [row.row for row in rows],
            "places": [int(place) for place in found.rows],
            "diagnosis": list(lines),
        }
        write_text(self._folder / f"{name}.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """While open, the name of the first module whose output is not finite is added to the list."""
    first: list[str] = []

    def look(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if not first and not all(_finite(t) for t in _tensors_in(output)):
            first.append(name)

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_hook(functools.partial(look, name)) for name, module in named]
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


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _arrays_of(row: Any) -> dict[str, np.ndarray]:
    if not dataclasses.is_dataclass(row):
        return {}
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


@dataclass
class Start:
    """How a run begins.

    Attributes:
        asked: the settings as the user gave them.
        config: those to run with: what the run chose itself when it began is given.
        goes_on: whether the run in the folder goes on, in the same folder.
        found: the checkpoint that it goes on from; None where it begins with its first step.
        run: that goes on, as it was.
        longer: whether its length was changed.
        done: whether the run in the folder is finished, so that nothing is trained.
        lock: of the folder, where that existed.
    """

    asked: RunConfig
    config: RunConfig
    goes_on: bool = False
    found: Checkpoint | None = None
    run: Run | None = None
    longer: bool = False
    done: bool = False
    lock: RunLock | None = None
    choices: Mapping[str, object] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The step that it goes on from; None where it begins with the first."""
        return None if self.found is None else self.found.step

    @property
    def finished(self) -> bool:
        """Whether the run that goes on was done."""
        return self.run is not None and self.run.state == FINISHED

    @property
    def training(self) -> Mapping[str, Any]:
        """What the run that goes on noted for this; empty for a new run."""
        return {} if self.run is None else self.run.training or {}

    @property
    def rows(self) -> Mapping[str, Any] | None:
        """What the run in the folder noted of its rows; None where they need not be the same."""
        noted: Mapping[str, Any] | None = None if self.found is None else self.found.values["rows"]
        return self.training.get("rows", noted) if self.done else noted

    @property
    def lines_kept(self) -> int:
        """Lines of the metrics that stay."""
        if self.found is None:
            return 0
        return int((self.finished_there or {"lines": self.found.values["metrics_lines"]})["lines"])

    @property
    def finished_there(self) -> Mapping[str, Any] | None:
        """What was noted when the run was done at the step that it goes on from; None where it was not."""
        noted: Mapping[str, Any] | None = self.training.get("finished")
        return noted if noted is not None and noted["steps"] == self.step else None

    def as_written(self, config: RunConfig) -> RunConfig:
        """The user's settings, with the activation checkpointing that ``memory`` led to."""
        train = self.asked.train.model_copy(update={"checkpointing": config.train.checkpointing})
        return self.asked.model_copy(update={"train": train})

    def as_begun(self) -> dict[str, tuple[object, str]]:
        """What was chosen when the run began, for the settings that leave it open."""
        open_keys = {key for key, value in flat(dumped(self.asked)).items() if value in ("auto", "search", None)}
        return {k: (v, "as the run began") for k, v in self.choices.items() if k in open_keys}

    def check_length(self, total_steps: int) -> None:
        """Refuse to go on where no step is left.

        Raises:
            UserError: none is, or the checkpoint is beyond the end.
        """
        if self.found is None or self.found.step < total_steps:
            return
        if self.found.step == total_steps and not self.finished:
            return  # it was stopped in its last evaluation
        what = f"the run has done {self.found.step} steps, and the settings ask for {total_steps}"
        hint = "ask for more with --train.epochs or --train.max_steps"
        raise UserError(what, where=str(self.found.path.parent.parent), hint=hint)


def settings_to_resume(run: Path, given: Mapping[str, Any]) -> RunConfig:
    """The settings that a run was told, with those that are ``given`` above them.

    Raises:
        UserError: there is no such run, or its settings name what the caller has to allow.
    """
    if not (run / SETTINGS).is_file():
        raise UserError("there is no run to resume", where=str(run), hint=runs_near(run))
    return settings_in(run, given, all_of_it=True)


def begin(output: Path, config: RunConfig, *, asked: bool, fresh: bool, say: Say) -> Start:
    """Decide how a run into ``output`` begins; nothing is changed there but the lock.

    Args:
        config: the user's settings. asked: whether the user said that the run there goes on.
        fresh: whether the user said that it does not.

    Raises:
        UserError: the folder is in use, or the run in it cannot go on with these settings.
    """
    if not (output / FOLDER).is_dir():
        if asked:
            raise _nothing(Run(output))
        return Start(config, config)
    lock = RunLock(output)
    try:
        start = Start(config, config) if fresh else decide_start(output, config, asked, say)
    except BaseException:
        lock.release()
        raise
    start.lock = lock
    return start


def decide_start(output: Path, config: RunConfig, asked: bool, say: Say) -> Start:
    """Decide whether a run resumes the one in ``output``, without locking the folder.

    Raises:
        UserError: the run in the folder cannot continue with these settings.
    """
    run = Run(output)
    if run.training is None:
        if asked:
            raise _nothing(run)
        return Start(config, config)
    found, damaged = newest(output / FOLDER)
    for path, why in damaged:
        say(f"{path.name} is damaged and was skipped: {why}")
    if run.state == FINISHED and not asked:
        require_same_result(run, config, say)
        return Start(config, config, found=found, run=run, done=True)
    if found is None:
        return _from_the_first_step(run, config, asked, say)
    choices = found.values["choices"]
    before = found.values["settings"]
    differing = changes(before, config, choices)
    other = refusal(differing, asked=asked)
    done = f"step {found.step} of {run.total_steps}"
    if other and run.state == DIVERGED and not asked:
        return Start(config, config)  # nobody wants to go on with what diverged
    if other:
        raise refused(output, done, other, asked=asked)
    longer = any(change.key in LENGTH for change in differing)
    if longer:  # how many steps a time budget gave holds no more
        choices = {key: value for key, value in choices.items() if key not in LENGTH}
    pinned, said = with_choices(config, before, choices)
    say(f"the run in {output} resumes from {done} ({found.path.name})")
    for line in [*said, *_rounded(differing)]:
        say(line)
    return Start(config, pinned, goes_on=True, found=found, run=run, longer=longer, choices=choices)


def _from_the_first_step(run: Run, config: RunConfig, asked: bool, say: Say) -> Start:
    """A run that left no whole checkpoint: it begins anew, in the same folder where nothing would be lost."""
    output = run.path
    if asked or run.training is None:
        raise _nothing(run)
    other = refusal(changes(run.training["settings"], config), asked=False)
    if other or (output / ADAPTER_CONFIG).exists():
        return Start(config, config)
    there = "no whole checkpoint" if listed(output / FOLDER) else "no checkpoint yet"
    say(f"the run in {output} was stopped and has {there}: it starts again at its first step")
    return Start(config, config, goes_on=True, run=run)


def _rounded(differing: list[Change]) -> list[str]:
    """What to say of changes that round the steps to come in another way."""
    return [f"{change}: the steps to come are rounded differently" for change in differing if change.key in ROUNDING]


def _nothing(run: Run) -> UserError:
    """No checkpoint is there that a run could go on from."""
    kept = [run.setting(f"train.{key}") for key in ("checkpoint_every", "checkpoint_minutes")]
    if listed(run.path / FOLDER):
        why = "its checkpoints are damaged"
    elif run.settings and kept == [None, None]:
        why = "train.checkpoint_every and train.checkpoint_minutes are null in its settings"
    elif run.training is not None and run.state != FINISHED:
        state = KILLED if run.state == RUNNING else run.state  # by a process of another host: this one has the lock
        why = f"the run ended before its first one ({state} after {run.steps:,} steps)"
    else:
        why = "none was kept, as in a comparison"
    anew = f"start anew: deltaw train {shell_word(str(run.path / SETTINGS))} --fresh"
    return UserError(f"there is no checkpoint to resume from:\n  {why}", where=str(run.path), hint=anew)


SUMS = ("rows", "tokens", "computed_tokens", "label_tokens", "steps", "seconds")


@dataclass(frozen=True)
class Result:
    """What a run came to; ``as_dict`` is what ``train --json`` prints.

    Attributes:
        seconds_by_part: where this process's time went, such as ``training``, ``loading`` or ``evaluating``.
        generation: verdict on greedy answers before and after training, of
            :func:`deltaw.training.monitoring.generation.verdict_of`; empty if they were not compared.
        earlier: what the folder of a run holds that was finished before, so that nothing was trained; else None.
    """

    output: Path
    outcome: Outcome
    evaluation: Evaluation
    peak_memory_bytes: int
    plan: Plan | None = None
    trained_parameters: int = 0
    method: str = ""
    task: str = ""
    writes_text: bool = True
    drift: Drift | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: Mapping[str, str] = field(default_factory=dict)
    approximations: Mapping[str, object] = field(default_factory=dict)
    best: Mapping[str, object] | None = None
    stopped_early: str | None = None
    resumed_from_step: int | None = None
    checkpoints: Sequence[Path] = ()
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)
    earlier: Mapping[str, Any] | None = None

    @classmethod
    def of_finished(cls, run: Run) -> Result:
        """What a finished run came to, as its folder tells: no plan, and nothing of single rows."""
        told, score = run.result, mapping(run.result.get("score"))
        outcome = Outcome(**{name: told[name] for name in SUMS if name in told})
        outcome.loss_sum = (told.get("train_loss") or 0.0) * outcome.label_tokens
        metrics = mapping(told.get("eval"))
        sets = metrics if any(isinstance(value, Mapping) for value in metrics.values()) else {"": metrics}
        main = str(score.get("metric", ""))
        found = [Evaluation(_numbers(values), main, name=name) for name, values in sets.items()]
        others = {one.name: one for one in found[1:]}
        evaluation = replace(found[0], interval=tuple(score.get("interval") or ()) or None, others=others)
        drift: dict[str, Any] = {k: value for k, value in _numbers(told.get("drift")).items() if k != "change"}
        same = (
            "trained_parameters",
            "best",
            "stopped_early",
            "resumed_from_step",
            "arithmetic",
            "approximations",
            "generation",
        )
        kept = {name: told[name] for name in (*same, "seconds_by_part") if told.get(name) is not None}
        kept |= {"drift": Drift(**drift) if drift else None, "earlier": told, "method": run.method, "task": run.task}
        kept |= {"writes_text": run.values.get("writes_text", True), "checkpoints": listed(run.path / FOLDER)}
        return cls(run.path, outcome, evaluation, run.peak_bytes or 0, **kept)

    @property
    def planned_memory_bytes(self) -> int | None:
        return None if self.plan is None else self.plan.peak_resident_bytes

    @property
    def interrupted(self) -> bool:
        return self.outcome.interrupted

    def as_dict(self) -> dict[str, object]:
        done = self.outcome
        seconds = done.seconds or math.inf
        found = {
            **{name: getattr(done, name) for name in SUMS},
            "rows_per_second": done.rows / seconds,
            "tokens_per_second": done.tokens / seconds,
            "train_loss": done.loss if done.steps else None,
            "trained_parameters": self.trained_parameters,
            "eval": self.evaluation.as_dict() or None,
            "score": self.evaluation.score(),
            "best_step": None if self.best is None else self.best["step"],
            "best": self.best,
            "stopped_early": self.stopped_early,
            "drift": None if self.drift is None else self.drift.as_dict(),
            "generation": dict(self.generation) or None,
            "peak_memory_bytes": self.peak_memory_bytes,
            "planned_memory_bytes": self.planned_memory_bytes,
            "arithmetic": dict(self.arithmetic) or None,
            "approximations": dict(self.approximations),
            "interrupted": done.interrupted,
            "skipped_steps": done.skipped,
            "resumed_from_step": self.resumed_from_step,
            "seconds_by_part": dict(self.seconds_by_part),
            **(self.earlier or {}),
        }
        files = [os.fspath(path) for path in self.checkpoints]
        return {"output": os.fspath(self.output), **found, "checkpoints": files}


def _numbers(values: object) -> dict[str, float]:
    """Numbers by name from JSON, whose null is nan."""
    return {name: math.nan if value is None else value for name, value in mapping(values).items()}


class RunRecord:
    """Keeps ``run.json`` and the checkpoints of a run current. Made once the run's folder is there.

    Args:
        rows: of :func:`deltaw.runs.resuming.rows_facts`.
        choices: of :func:`deltaw.runs.resuming.choices_of`.
        say: told what a person may want to know.

    Attributes:
        checkpoints: of the run.
        extras: by name, what changes over the run and is kept with every checkpoint; to be filled before
            :meth:`restore`.
    """

    def __init__(
        self, start: Start, session: Session, folder: RunFolder, *, rows: Facts, choices: Facts, say: Say
    ) -> None:
        settings = session.config.train
        self._start, self._session, self._folder, self._say = start, session, folder, say
        self._state: TrainState | None = None
        self._settings = dumped(start.asked)
        kept = session.chosen.get("train.keep_features")
        features = FeatureRecord(session.feed.store, "off" if kept is None else str(kept.value), say)
        self.extras: dict[str, Stateful] = {"features": features}
        self._features: Mapping[str, Any] = features.state()
        if start.goes_on:
            self._features = start.training["features"]
            if start.found is None:
                features.restore(self._features)
        self.checkpoints = Checkpoints(
            folder.path / FOLDER,
            every=settings.checkpoint_every,
            minutes=settings.checkpoint_minutes,
            keep=settings.keep_checkpoints,
            about={"settings": self._settings, "choices": dict(choices), "rows": dict(rows), "model": session.identity},
            extras=self.extras,
            sync=folder.sync_metrics,
        )
        self._write(RUNNING, process=this_process(), ended=None)

    def describe(self, plan: Plan | None, chosen: Mapping[str, Choice], limit: int) -> None:
        """Note what is known before the first step: see :func:`deltaw.runs.summary.facts`."""
        self._folder.note(**facts(self._session, plan, chosen, limit))

    def add(self, name: str, extra: Stateful, *, durable: Callable[[], None]) -> None:
        """Keep what changes over the run with every checkpoint; before :meth:`restore`.

        Args:
            durable: called between two steps once a checkpoint is on the disk.
        """
        self.extras[name] = extra
        self.checkpoints.durable = durable

    def chose(self, choices: Mapping[str, object]) -> None:
        """The run chose more than it had when this was made."""
        self.checkpoints.about["choices"] = dict(choices)

    @property
    def saved(self) -> SavedState | None:
        """What the training goes on from; None where it begins with its first step."""
        found = self._start.found
        if found is None:
            return None
        saved = SavedState(found.values["training"], found.tensors)
        return saved.lasting(self._session.total_steps) if self._start.longer else saved

    def restore(self) -> None:
        """Clear what killed processes left, and give the extras back their state."""
        self.checkpoints.clear(after=self._start.step or 0)
        found = self._start.found
        if found is None:
            return
        finished = self._start.finished_there
        if finished is not None:  # with what the evaluation after the last step added
            found = replace(found, values=found.values | {k: finished[k] for k in ("best", "extras")})
        self.checkpoints.went_on_from(found)

    def begin(self, state: TrainState) -> None:
        """The first step is about to begin."""
        self._state = state
        self.checkpoints.begin(state)
        if self._start.longer and self._start.found is not None:
            rate = f"the learning rate continues at {state.learning_rate:.3g}, that of a run of this length"
            self._say(f"{state.total_steps} steps now; {rate}")

    def diagnose(self, found: NotFinite) -> Sequence[str]:
        """What is wrong with a step, once all that was trained before it is safe."""
        lines = []
        try:
            self.checkpoints.write()
        except UserError as error:
            lines.append(error.what)
        return [*lines, *Diagnosis(self._session, self._folder.path)(found)]

    def where(self) -> str:
        """The place in the training, for a person."""
        state = self._state
        return "before the first step" if state is None else f"step {state.step + 1} of {state.total_steps}"

    def done(self, outcome: Outcome) -> None:
        """The training and all that follows it is over.

        Raises:
            UserError, OSError: that cannot be written down.
        """
        self._write(INTERRUPTED if outcome.interrupted else FINISHED)

    def came_to(self, result: Result) -> Result:
        """Note the result of a run that is done, and pass it on. A result that cannot be noted is a warning."""
        more: dict[str, Any] = {"result": plain(result.as_dict())}
        if not result.interrupted and result.stopped_early is None:  # a time budget plans the steps on the way
            more["total_steps"] = result.outcome.steps
        try:
            self._folder.note(**self._at_the_end(INTERRUPTED if result.interrupted else FINISHED), **more)
        except (OSError, UserError) as error:
            warnings.warn(f"the result could not be written: {error}", stacklevel=2)
        return result

    def failed(self, error: BaseException) -> None:
        """The run ended with an error, which is raised afterwards."""
        if isinstance(error, LostProcess):
            self._save_whole_steps()
        state = {NotFiniteError: DIVERGED, KeyboardInterrupt: INTERRUPTED}.get(type(error), FAILED)
        try:
            self.checkpoints.close()
        except UserError as another:
            self._say(another.what)
        more: dict[str, Any] = {}
        if isinstance(error, UserError):
            more = {"error": plain({"what": error.what, "where": error.where, "hint": error.hint})}
        elif state == FAILED:
            more = {"error": plain({"what": clean(f"{type(error).__name__}: {error}")})}
        try:
            self._write(state, **self._at_the_end(state), **more)
        except (UserError, OSError) as another:
            self._say(f"the run's state could not be written: {another}")

    def _save_whole_steps(self) -> None:
        """Another process is lost: what was trained before the step that it broke is the run's."""
        try:
            self.checkpoints.write()
            self.checkpoints.check(until_durable=True)
        except (UserError, OSError) as another:
            self._say(f"no checkpoint could be written: {another}")
            return
        last = self.checkpoints.last
        if last is not None:
            self._say(f"all steps before are in {last}: the same command resumes there")

    def _at_the_end(self, state: str) -> dict[str, Any]:
        """When the run ended, what it chose on the way, and commands to go on with; before it was described, only
        when."""
        ended: dict[str, Any] = {"ended": time.time()}
        known = self._folder.values
        if "chosen" not in known:
            return ended
        chosen = {**known["chosen"], **told_choices(self._session.chosen)}
        commands = next_commands(
            self._folder.path, state, known["method"], known["task"], writes_text=known["writes_text"]
        )
        return {**ended, "chosen": plain(chosen), "commands": commands}

    def _write(self, state: str, **more: Any) -> None:
        steps = (self._start.step or 0) if self._state is None else self._state.step
        finished = self._start.training.get("finished")
        if state == FINISHED:
            finished = {"steps": steps, "lines": self._folder.sync_metrics(), **self.checkpoints.beside()}
        training = {"steps": steps, "settings": self._settings, "features": self._features, "finished": finished}
        training["rows"] = self.checkpoints.about["rows"]
        total = {} if "total_steps" in self._folder.values else {"total_steps": self._session.total_steps}
        self._folder.note(state=state, training=training, **total, **more)


_OF_THE_DISK = {
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
# How torch's allocator of main memory says that there is none, on Linux and on Windows.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory")


@contextlib.contextmanager
def clear_end(run: Path, *, where: Callable[[], str], last: Callable[[], Path | None]) -> Iterator[None]:
    """While open, errors of the machine become errors that say what to do.

    Args:
        run: the folder that is written to.
        where: the place in the training, asked when something happens.
        last: the newest checkpoint; None where there is none.

    Raises:
        UserError: the machine has no memory or no room on the disk, or a file is gone.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        hint = "lower train.tokens_per_pass, set train.checkpointing: true, or train fewer parameters"
        what = f"the machine is out of memory: {first_line(error)}"
        raise UserError(what, where=where(), hint=f"{hint}; {_goes_on(last())}") from error
    except (OSError, SafetensorError) as error:
        if (wrong := _disk_error(error)) is None:
            raise
        file = getattr(error, "filename", None)
        hint = f"make it writable again and free some space; {_goes_on(last())}"
        raise UserError(f"{wrong}, so the run cannot continue", where=str(file or run), hint=hint) from error


def _goes_on(last: Path | None) -> str:
    if last is None:
        return "the run has no checkpoint yet and starts again at its first step"
    return f"the same command resumes from {last.name}"


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in _NO_MEMORY)


def _disk_error(error: Exception) -> str | None:
    """What an error of the disk means; None where it is none of these."""
    if isinstance(error, OSError):
        return _OF_THE_DISK.get(error.errno or 0)
    number = str(error).rpartition("os error ")[2].partition(")")[0]  # as safetensors writes it
    return _OF_THE_DISK.get(int(number)) if number.isdigit() else None
