"""Whether a run goes on from a checkpoint, and with which settings.

A run that goes on must be the run that it was: a changed setting that would make it another one is refused by
name. What was chosen automatically is taken from the checkpoint, since it decides the rounding: every later
step is then equal to the bit.

Knows settings, choices and rows; not models or tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.data.row_store import digest_of_rows
from deltaw.errors import UserError
from deltaw.hub.loading import LoadedModel
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import STORED, Arithmetic
from deltaw.machine.choices import Choice, choose_device
from deltaw.methods import registry
from deltaw.platforms import shell_word
from deltaw.runs.folder import Run, mapping
from deltaw.settings import RunConfig, flat, settings
from deltaw.training.callbacks import Say
from deltaw.training.parallel.group import Group
from deltaw.training.parallel.reducer import Reducer
from deltaw.training.session import Session, assemble
from deltaw.training.tasks.base import RunData, Task

# How long a training is; may change where the user says that it goes on.
LENGTH = ("train.epochs", "train.max_steps", "train.time")
# May change at any time, since no step depends on them.
_WATCHING = ("eval_every", "eval_answers", "samples", "early_stopping", "adapter", "drift", "not_finite")
_KEEPING = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")
FREE = {"output", "force", "track", "trust_remote_code", "data.cache"}
FREE |= {f"train.{key}" for key in (*_WATCHING, *_KEEPING)}
# No run chooses them itself: a checkpoint from somewhere else that says so is not believed.
NEVER_CHOSEN = {"model", "data.train", "data.eval", "data.chat_template", "track", "trust_remote_code", "output"}
# May change, but then the steps to come are rounded in another way.
_COMPUTING = ("tokens_per_pass", "approximate", "share_prefixes", "checkpointing", "keep_features", "sharding")
ROUNDING = {"device", "threads", "memory"} | {f"train.{key}" for key in _COMPUTING}
# What a finished run's result does not depend on, but for rounding.
_SAME_RESULT = (FREE | ROUNDING) - {f"train.{key}" for key in _WATCHING}


@dataclass(frozen=True)
class Change:
    """A setting that differs from what a run began with; ``before`` is what it was resolved to."""

    key: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"'{self.key}' is {_shown(self.now)}, and the run began with {_shown(self.before)}"


def dumped(config: RunConfig) -> dict[str, Any]:
    """Every setting as plain values, nested as in the file."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def changes(before: Mapping[str, Any], now: RunConfig, choices: Mapping[str, object] | None = None) -> list[Change]:
    """The settings that differ and matter to the run.

    Sections of methods that are not used do not matter, nor does an ``auto`` that became its own choice, or
    another way to write the same path. Rows are compared by what they are, not by where they lie.

    Args:
        before: as :func:`dumped`. choices: what was chosen automatically then, by dotted key.
    """
    theirs, ours = flat(before), flat(dumped(now))
    unused = {entry.name for entry in registry.registered()} - {now.method}
    found = []
    for key in sorted({*theirs, *ours}):
        old, new = theirs.get(key), ours.get(key)
        if old == new or key.partition(".")[0] in unused:
            continue
        chosen = (choices or {}).get(key)
        if chosen is not None and new == chosen:
            continue
        if key in ("model", "output", "data.train", "data.eval") and _same_place(old, new):
            continue
        found.append(Change(key, chosen if old == "auto" and chosen is not None else old, new))
    return found


def refusal(found: Sequence[Change], *, asked: bool) -> list[Change]:
    """Those of the changes with which the run would be another one.

    Args:
        asked: whether the user said that it goes on, so that it may become longer.
    """
    allowed = FREE | ROUNDING | (set(LENGTH) if asked else set())
    # The rows themselves are compared once they are read.
    return [change for change in found if change.key not in {*allowed, "data.train"}]


def require_same_result(run: Run, config: RunConfig, say: Say) -> None:
    """Refuse settings with which a finished run would have come to something else.

    Args:
        say: told of those that would have rounded differently.

    Raises:
        UserError: they differ; it names them, and what continues the run or starts anew.
    """
    before = {} if run.training is None else run.training["settings"]
    chosen = {key: mapping(choice).get("value") for key, choice in run.chosen.items()}
    differing = changes(before, config, chosen)
    found = [change for change in differing if change.key not in {*_SAME_RESULT, "data.train"}]
    if found:
        raise refused(run.path, DONE, found, asked=False)
    for change in differing:
        if change.key in ROUNDING:
            say(f"{change}: no effect, the run is finished")


def with_choices(
    config: RunConfig, before: Mapping[str, Any], choices: Mapping[str, object]
) -> tuple[RunConfig, list[str]]:
    """The settings with what was chosen automatically in place of every ``auto`` that the user has not
    changed since, and lines about what cannot be chosen so again."""
    theirs, ours = flat(before), flat(dumped(config))
    said: list[str] = []
    flags: dict[str, Any] = {}
    for key in (setting.key for setting in settings()):
        if key not in choices or key in NEVER_CHOSEN or key not in ours or ours[key] != theirs.get(key):
            continue
        value = choices[key]
        if key == "device" and not _is_there(str(value)):
            said.append(f"the run began on {value}, which is not available here: its steps will be rounded differently")
            continue
        section, _, leaf = key.rpartition(".")
        (flags.setdefault(section, {}) if section else flags)[leaf] = value
    return RunConfig.read(dumped(config), flags), said


def choices_of(session: Session, loaded: Mapping[str, Choice]) -> dict[str, object]:
    """What a run chose itself, by dotted key: all that decides how its steps are rounded.

    Args:
        loaded: the choices of :class:`deltaw.hub.loading.LoadedModel`.
    """
    keys = {setting.key for setting in settings()}
    chosen = {key: choice.value for key, choice in {**loaded, **session.chosen}.items() if key in keys}
    kept = chosen.get("train.keep_features", "off")
    return {
        **chosen,
        "train.keep_features": kept not in ("off", "recomputed"),
        "train.learning_rate": session.learning_rate,
        "train.checkpointing": session.config.train.checkpointing,
    }


def require_same_model(run_identity: str | None, session: Session, run: Path) -> None:
    """Check that the model weights are the ones the run started with.

    Args:
        run_identity: Identity of the weights that the run recorded, or None.

    Raises:
        UserError: if they differ.
    """
    if run_identity is not None and session.identity is not None and run_identity != session.identity:
        what = "the model's weights have changed since the run started, so it cannot be resumed"
        hint = f"restore the model to resume, or {START_ANEW}".format(run=run)
        raise UserError(what, where=f"model: {session.config.model}", hint=hint)


def compute_as(arithmetic: object) -> tuple[str, ...]:
    """Compute products as a training did when its state was saved, where this machine can; whoever restores
    the state warns where it cannot. ``DELTAW_KERNELS`` goes first.

    Returns:
        what it computed approximately, but for what the environment leaves out.
    """
    try:
        saved = Arithmetic.read(arithmetic if isinstance(arithmetic, Mapping) else {})
    except ValueError:
        return ()
    exact = saved.approximating(())
    if variants.asked().kernels is None and exact != loader.arithmetic():
        with contextlib.suppress(UserError, OSError, RuntimeError, ValueError):
            loader.compute_with(exact)
    return tuple(name for name in saved.approximations if variants.is_left_in(name))


def rows_facts(train: Sequence[Any], held_out: Sequence[Any]) -> dict[str, object]:
    """What a checkpoint says of a run's rows."""
    parts = {"train": train, "eval": held_out}
    return {name: {"count": len(rows), "digest": digest_of_rows(rows)} for name, rows in parts.items()}


def require_same_rows(
    before: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig, run: Path, *, done: bool = False
) -> None:
    """Refuse rows that are not those that a run began with.

    Args:
        done: whether that run is finished.

    Raises:
        UserError: they differ; it names the setting that the rows come from.
    """
    for part, what in (("train", "rows to train on"), ("eval", "held-out rows")):
        theirs, ours = before.get(part), now[part]
        if theirs == ours:
            continue
        counts = "" if not isinstance(theirs, Mapping) else f"{theirs.get('count', 0):,}"
        count = f"{ours['count']:,} rows, and there were {counts}" if counts else "they differ"
        if isinstance(theirs, Mapping) and theirs.get("count") == ours["count"]:
            count = f"still {counts} rows, but not the same ones"
        source = config.data.train if part == "train" or not isinstance(config.data.eval, str) else None
        end = "and the run is finished" if done else "so the run cannot be resumed"
        changed = f"the {what} have changed, {end}:\n  {count}"
        hint = f"{'' if done else 'restore the data to resume, or '}{START_ANEW}".format(run=run)
        raise UserError(changed, where=f"data.{part}: {source or config.data.eval}", hint=hint)


START_ANEW = "start anew: --fresh (moves {run}), or --output OTHER"
# How far a run came that is finished.
DONE = "done"


def refused(run: Path, done: str, found: Sequence[Change], *, asked: bool) -> UserError:
    """The error for settings with which a run cannot go on, or would have come to something else.

    Args:
        done: how far it came, in words; ``done`` if it is finished.
    """
    longer = [f"--{change.key} {_shown(change.now)}" for change in found if change.key in LENGTH and not _less(change)]
    ways = [START_ANEW.format(run=run)]
    if len(longer) == len(found) and not asked:
        ways.insert(0, f"deltaw train --resume {shell_word(str(run))} {' '.join(longer)}")
    elif done != DONE:
        ways.insert(0, "undo the change to resume")
    shown = [*map(str, found[:4]), *([f"and {len(found) - 4} more"] if len(found) > 4 else [])]
    what = f"the run in this folder is not finished ({done}), and cannot be resumed so:"
    if done == DONE:
        what = "the run in this folder is finished, and was trained with other settings:"
    return UserError("\n  ".join([what, *shown]), where=str(run), hint=", or\n".join(ways))


def _less(change: Change) -> bool:
    before, now = change.before, change.now
    return isinstance(before, int | float) and isinstance(now, int | float) and now < before


def _same_place(first: object, second: object) -> bool:
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    paths = [os.path.normcase(os.path.realpath(os.path.expanduser(path))) for path in (first, second)]
    return paths[0] == paths[1] and os.path.exists(paths[0])


def _is_there(device: str) -> bool:
    try:
        choose_device(device)
    except UserError:
        return False
    return True


def _shown(value: object) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# What all processes of a run must have alike: the settings travel; model, precision and rows are compared.
#
# Each process reads the model and the rows from its own machine's files, so that they may differ there.

_ROWS = "give each machine the same files of rows, or a folder that all of them see"
_HINTS = {
    "precision": "set precision to one that all machines have",
    "rows": _ROWS,
    "evaluation sets": _ROWS,
    "model": "give each machine the same model",
}


def send_settings(config: RunConfig | None, processes: Reducer) -> None:
    """From process 0 to all others, where there are any; None: there is nothing to train."""
    if isinstance(processes, Group):
        processes.send_text("null" if config is None else config.model_dump_json())


def receive_settings(group: Group) -> RunConfig | None:
    """Those of process 0."""
    told = json.loads(group.receive_text())
    return None if told is None else RunConfig.read(told)


def assemble_alike(
    config: RunConfig,
    task: Task,
    data: RunData,
    loaded: LoadedModel,
    processes: Reducer,
    begun: Sequence[str] | None,
    **how: Any,
) -> Session:
    """The session of a run, in each process; what must be alike is compared with process 0.

    Args:
        begun: what a training that goes on computed approximately, as process 0 has it from its state.
        how: further options of :func:`deltaw.training.session.assemble`.

    Raises:
        UserError: something differs.
    """
    if isinstance(processes, Group):  # before anything is computed together
        _compare(_facts_of_rows(data, loaded), processes)
        begun = _compute_alike(begun, processes)
    session = assemble(
        config,
        task,
        data,
        loaded.model,
        device=str(loaded.choices["device"].value),
        new_modules=loaded.new_modules,
        offered=() if loaded.kernels is None else loaded.kernels.approximations,
        begun=begun,
        processes=processes,
        **how,
    )
    if isinstance(processes, Group):
        _compare({"model": session.identity}, processes)
        # From here on process 0 does things by itself.
        processes.together = False
    return session


def _compute_alike(begun: Sequence[str] | None, group: Group) -> Sequence[str] | None:
    """Let each process compute products as process 0 does.

    Returns:
        ``begun`` of process 0.

    Raises:
        UserError: one cannot, or is told not to.
    """
    ours = loader.arithmetic()
    if group.rank == 0:
        group.send_text(json.dumps([ours.as_dict(), begun]))
        return begun
    told, begun = json.loads(group.receive_text())
    theirs = Arithmetic.read(told)
    if theirs != ours:
        forced = variants.asked()
        reason = f"{forced.said} is set there" if forced.said else None
        try:
            if reason is None:
                loader.compute_with(theirs)
        except (UserError, OSError, RuntimeError, ValueError) as error:
            reason = error.what if isinstance(error, UserError) else str(error)
        if reason is not None:
            what = f"it computes with {_named(ours)}, process 0 with {_named(theirs)}: {reason}"
            hint = f"set {variants.VARIABLE} in every process to kernels that all processors have"
            raise UserError(what, where=f"the processor of process {group.rank}", hint=hint)
    return begun


def _named(arithmetic: Arithmetic) -> str:
    ways = ", ".join(f"{stored} {arithmetic.of(stored)}" for stored in STORED)
    return f"{arithmetic.kernels or 'no'} kernels ({ways})"


def _facts_of_rows(data: RunData, loaded: LoadedModel) -> dict[str, Any]:
    return {
        "precision": str(loaded.choices["precision"].value),
        "rows": dict(rows_facts(data.train, data.held_out)),
        "evaluation sets": {name: digest_of_rows(rows) for name, rows in data.eval_sets.items()},
    }


def _compare(facts: dict[str, Any], group: Group) -> None:
    """Process 0 sends its facts, and the others compare them with their own."""
    if group.rank == 0:
        group.send_text(json.dumps(facts))
        return
    theirs = json.loads(group.receive_text())
    for name, ours in json.loads(json.dumps(facts)).items():
        if ours != theirs[name]:
            what = f"it does not have the same {name} as process 0"
            raise UserError(what, where=f"{name}: {_brief(ours)} instead of {_brief(theirs[name])}", hint=_HINTS[name])


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
