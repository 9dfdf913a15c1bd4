"""What a run writes about itself so that it can go on: its status and its checkpoints.

Knows a session, a folder and how the run began; not the training's steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.data.packing import rows_of
from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.methods.base import ADAPTER_CONFIG
from deltaw.settings import RunConfig
from deltaw.tensor_files import save_tensors
from deltaw.training.callbacks import Say
from deltaw.training.checkpoints import Checkpoint, Checkpoints, Stateful, listed, newest, training_of
from deltaw.training.features.store import FeatureRecord
from deltaw.training.origin import settings_in
from deltaw.training.parallel.group import LostProcess
from deltaw.training.resuming import LENGTH, ROUNDING, Change, changes, dumped, flat, refusal, refused, with_choices
from deltaw.training.run_folder import FOLDER, SETTINGS, RunFolder, RunLock, Status, read_status
from deltaw.training.session import Session
from deltaw.training.state import NotFinite, NotFiniteError, Outcome, SavedState, TrainState

# ---- Where numbers stopped being finite: the step's rows are run again, and every module is watched.
#
# What is found first is named: a parameter, a module's output, the loss, or a parameter's gradient. The rows
# are saved, so that the step can be looked at again elsewhere. Knows a session and a step.


# Row numbers that a line shows.
_SHOWN = 12


class Diagnosis:
    """Finds out what is wrong with a step's rows, and saves them.

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
        numbers = [row.row for item in items for row in rows_of(item)]
        try:
            lines = [self.first_place(items)]
        except Exception as error:  # whatever a model in this state raises; the step's own error comes first
            lines = [f"its rows could not be run again ({type(error).__name__}: {str(error)[:100]})"]
        shown = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
        lines.append(f"rows of the step: {shown}")
        name = f"failed_step-{found.step:06d}"
        try:
            self._save(name, found, items, numbers, lines)
        except OSError as error:
            return [*lines, f"they could not be saved: {error.strerror or error}"]
        return [*lines, f"saved as {name}.json and {name}.safetensors in {self._folder}"]

    def first_place(self, items: Sequence[Any]) -> str:
        """The first thing that is not finite when these rows are run, in words."""
        session = self._session
        broken = [name for name, p in session.model.named_parameters() if not _finite(p)]
        if broken:
            return f"the weights were not finite before the step: {_listed(broken)}"
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
            failing = [
                name for (name, _), g in zip(trained, gradients, strict=True) if g is not None and not _finite(g)
            ]
            if failing:
                # A backward comes to the last layers first.
                return f"the loss is finite, and not the gradient, first of '{failing[-1]}'" + (
                    f" ({len(failing)} of {len(trained)} parameters)" if len(failing) > 1 else ""
                )
        return "run again, the rows give finite numbers: they are too large only when added up"

    def _save(
        self, name: str, found: NotFinite, items: Sequence[Any], numbers: Sequence[int], lines: Sequence[str]
    ) -> None:
        rows = [row for item in items for row in rows_of(item)]
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
            "rows": list(numbers),
            "places": [int(place) for place in found.rows],
            "diagnosis": list(lines),
        }
        write_text(self._folder / f"{name}.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """While open, the name of the first module whose output is not finite is added to the list."""
    first: list[str] = []
    hooks = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if not first and not all(_finite(t) for t in _tensors_in(output)):
                first.append(name)

        return look

    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_hook(watch(name)))
    try:
        yield first
    finally:
        for hook in hooks:
            hook.remove()


def _tensors_in(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors_in(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in _tensors_in(value)]
    return []


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _arrays_of(row: Any) -> dict[str, np.ndarray]:
    if not dataclasses.is_dataclass(row):
        return {}
    values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- How a run begins: in a folder of its own, or where the run in its folder stopped.
#
# Knows folders, settings and checkpoints; not models or rows.


@dataclass
class Start:
    """How a run begins.

    Attributes:
        asked: the settings as the user gave them.
        config: those to run with: what the run chose itself when it began is given.
        goes_on: whether the run in the folder goes on, in the same folder.
        found: the checkpoint that it goes on from; None where it begins with its first step.
        status: of the run that goes on.
        longer: whether its length was changed.
        lock: of the folder, where that existed.
    """

    asked: RunConfig
    config: RunConfig
    goes_on: bool = False
    found: Checkpoint | None = None
    status: Status | None = None
    longer: bool = False
    lock: RunLock | None = None
    choices: Mapping[str, object] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The step that it goes on from; None where it begins with the first."""
        return None if self.found is None else self.found.step

    @property
    def finished(self) -> bool:
        """Whether the run that goes on was done."""
        return self.status is not None and self.status.state == "finished"

    @property
    def lines_kept(self) -> int:
        """Lines of the metrics that stay."""
        if self.found is None:
            return 0
        finished = self.finished_there
        return int((finished or {"lines": self.found.values["metrics_lines"]})["lines"])

    @property
    def finished_there(self) -> Mapping[str, Any] | None:
        """What was noted when the run was done at the step that it goes on from; None where it was not."""
        noted = None if self.status is None else self.status.finished
        return noted if noted is not None and noted["steps"] == self.step else None

    def as_written(self, config: RunConfig) -> RunConfig:
        """The user's settings, with the activation checkpointing that ``memory`` led to."""
        checkpointing = config.train.checkpointing
        train = self.asked.train.model_copy(update={"checkpointing": checkpointing})
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
        raise UserError(
            f"the run has done {self.found.step} steps, and the settings ask for {total_steps}",
            where=str(self.found.path.parent.parent),
            hint="ask for more with --train.epochs or --train.max_steps",
        )


def settings_to_resume(run: Path, given: Mapping[str, Any]) -> RunConfig:
    """The settings that a run was told, with those that are ``given`` above them.

    Raises:
        UserError: there is no such run, or its settings name what the caller has to allow.
    """
    if not (run / SETTINGS).is_file():
        raise UserError(
            "there is no run to go on with",
            where=str(run),
            hint="give the folder of a run, the 'output' of its settings",
        )
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
            raise _nothing(output)
        return Start(config, config)
    lock = RunLock(output)
    try:
        start = Start(config, config) if fresh else _decided(output, config, asked, say)
    except BaseException:
        lock.release()
        raise
    start.lock = lock
    return start


def _decided(output: Path, config: RunConfig, asked: bool, say: Say) -> Start:
    status = read_status(output)
    if status is None or (status.state == "finished" and not asked):
        if asked:
            raise _nothing(output)
        return Start(config, config)
    found, damaged = newest(output / FOLDER)
    for path, why in damaged:
        say(f"{path.name} is damaged and passed over: {why}")
    if found is None:
        return _from_the_first_step(output, config, status, asked, say)
    choices = found.values["choices"]
    before = found.values["settings"]
    differing = changes(before, config, choices)
    other = refusal(differing, asked=asked)
    done = f"step {found.step} of {status.total_steps}"
    if other and status.state == "diverged" and not asked:
        return Start(config, config)  # nobody wants to go on with what diverged
    if other:
        raise refused(output, done, other, asked=asked)
    longer = any(change.key in LENGTH for change in differing)
    if longer:  # how many steps a time budget gave holds no more
        choices = {key: value for key, value in choices.items() if key not in LENGTH}
    pinned, said = with_choices(config, before, choices)
    say(f"the run in {output} goes on from {done} ({found.path.name})")
    for line in [*said, *_rounded(differing)]:
        say(line)
    return Start(config, pinned, goes_on=True, found=found, status=status, longer=longer, choices=choices)


def _from_the_first_step(output: Path, config: RunConfig, status: Status, asked: bool, say: Say) -> Start:
    """A run that left no whole checkpoint: it begins anew, in the same folder where nothing would be lost."""
    if status.state == "finished":
        raise _nothing(output)
    other = refusal(changes(status.settings, config), asked=asked)
    if asked and other:
        raise refused(output, "no step", other, asked=asked)
    if other or (output / ADAPTER_CONFIG).exists():
        return Start(config, config)
    there = "no whole checkpoint" if listed(output / FOLDER) else "no checkpoint yet"
    say(f"the run in {output} was stopped and has {there}: it begins again with its first step")
    return Start(config, config, goes_on=True, status=status)


def _rounded(differing: list[Change]) -> list[str]:
    """What to say of changes that round the steps to come in another way."""
    return [
        f"{change}: the steps to come are rounded otherwise than they would have been"
        for change in differing
        if change.key in ROUNDING
    ]


def _nothing(output: Path) -> UserError:
    return UserError(
        "there is no checkpoint to go on from",
        where=str(output),
        hint="train without --resume; runs write checkpoints unless train.checkpoint_every and "
        "train.checkpoint_minutes are both null",
    )


# ---- record


class RunRecord:
    """Keeps a run's status and checkpoints current. Made once the run's folder is there.

    Args:
        rows: of :func:`deltaw.training.resuming.rows_facts`.
        choices: of :func:`deltaw.training.resuming.choices_of`.
        say: told what a person may want to know.

    Attributes:
        checkpoints: of the run.
        extras: by name, what changes over the run and is kept with every checkpoint; to be filled before
            :meth:`restore`.
    """

    def __init__(
        self,
        start: Start,
        session: Session,
        folder: RunFolder,
        *,
        rows: Mapping[str, object],
        choices: Mapping[str, object],
        say: Say,
    ) -> None:
        settings = session.config.train
        self._start, self._session, self._folder, self._say = start, session, folder, say
        self._state: TrainState | None = None
        self._settings = dumped(start.asked)
        kept = session.chosen.get("train.keep_features")
        features = FeatureRecord(session.feed.store, "off" if kept is None else str(kept.value), say)
        self.extras: dict[str, Stateful] = {"features": features}
        self._features: Mapping[str, Any] = features.state()
        if start.goes_on and start.status is not None:
            self._features = start.status.features
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
        self._write("running")

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
        saved = training_of(found)
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
            self._say(
                f"{state.total_steps} steps now; the learning rate goes on with {state.learning_rate:.3g}, "
                "that of a run of this length"
            )

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
        self._write("interrupted" if outcome.interrupted else "finished")

    def failed(self, error: BaseException) -> None:
        """The run ended with an error, which is raised afterwards."""
        if isinstance(error, LostProcess):
            self._save_whole_steps()
        states = {NotFiniteError: "diverged", KeyboardInterrupt: "interrupted"}
        try:
            self.checkpoints.close()
        except UserError as another:
            self._say(another.what)
        try:
            self._write(states.get(type(error), "failed"))
        except (UserError, OSError) as another:
            self._say(f"the run's status could not be written: {another}")

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
            self._say(f"all steps before are in {last}: the same command goes on from there")

    def _write(self, state: str) -> None:
        steps = self._steps
        before = self._start.status
        finished: Mapping[str, Any] | None = None if before is None else before.finished
        if state == "finished":
            finished = {"steps": steps, "lines": self._folder.sync_metrics(), **self.checkpoints.beside()}
        Status(state, steps, self._session.total_steps, self._settings, self._features, finished).write(
            self._folder.path
        )

    @property
    def _steps(self) -> int:
        return (self._start.step or 0) if self._state is None else self._state.step
