"""Decide if a run can be resumed from a checkpoint, and with which settings.

Changed settings that would make it a different run are rejected by name. Automatic choices are restored from the
checkpoint because they determine rounding, so a resumed run is bitwise equal to an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.data.row_store import digest_of_rows
from deltaw.errors import UserError
from deltaw.kernels import loader, variants
from deltaw.kernels.arithmetic import Arithmetic
from deltaw.machine.choices import Choice, choose_device
from deltaw.methods.start import StartAdapter
from deltaw.platforms import shell_word
from deltaw.progress import LogFunction
from deltaw.runs.checkpoints import JSONMap
from deltaw.runs.folder import Run, mapping
from deltaw.settings import method_registry
from deltaw.settings.config import RunConfig, flat, settings
from deltaw.training.session import Session

# Training length. May change if the user explicitly resumes the run.
LENGTH_KEYS = ("train.epochs", "train.max_steps", "train.time")
# May always change because no step depends on them.
_EVALUATION_KEYS = ("eval_every", "eval_answers", "samples", "early_stopping", "saved_adapter", "drift", "not_finite")
_CHECKPOINT_KEYS = ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints")
FREE_KEYS = {"output", "force", "track", "trust_remote_code", "data.cache"}
FREE_KEYS |= {f"train.{key}" for key in (*_EVALUATION_KEYS, *_CHECKPOINT_KEYS)}
# Never chosen automatically. Such choices in an untrusted checkpoint are ignored.
NEVER_CHOSEN = {"model", "data.train", "data.eval", "data.chat_template", "track", "trust_remote_code"}
NEVER_CHOSEN |= {"output", "start_from"}
# May change, but affect the rounding of later steps.
_COMPUTE_KEYS = ("tokens_per_pass", "approximate", "share_prefixes", "checkpointing", "keep_features", "sharding")
ROUNDING_KEYS = {"device", "threads", "memory"} | {f"train.{key}" for key in _COMPUTE_KEYS}
# The result of a finished run depends on these settings only through rounding.
_SAME_RESULT_KEYS = (FREE_KEYS | ROUNDING_KEYS) - {f"train.{key}" for key in _EVALUATION_KEYS}


@dataclass(frozen=True)
class SettingChange:
    """Setting that differs from the run's. ``before`` is its resolved value at the start of the run."""

    key: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"'{self.key}' is {_format_value(self.now)}, and the run started with {_format_value(self.before)}"


def dump_settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings as nested plain values, as in the file."""
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def changed_settings(before: Mapping[str, Any], now: RunConfig, choices: JSONMap | None = None) -> list[SettingChange]:
    """Return the settings that differ and matter to the run.

    Sections of unused methods are ignored, and so are ``auto`` values with the same resolved value and equivalent
    paths. Rows are compared by content, not by path.

    Args:
        before: Settings of the run (:func:`dump_settings`).
        choices: Automatic choices of the run by dotted key.
    """
    old_values = flat(before)
    new_values = flat(dump_settings(now))
    unused = {entry.name for entry in method_registry.registered()} - {now.method}
    differing = []
    for key in sorted({*old_values, *new_values}):
        old = old_values.get(key)
        new = new_values.get(key)
        if old == new or key.partition(".")[0] in unused:
            continue
        chosen = (choices or {}).get(key)
        if chosen is not None and new == chosen:
            continue
        if key in ("model", "output", "data.train", "data.eval", "start_from") and _is_same_path(old, new):
            continue
        differing.append(SettingChange(key, chosen if old == "auto" and chosen is not None else old, new))
    return differing


def disallowed_changes(differing: Sequence[SettingChange], *, resume: bool) -> list[SettingChange]:
    """Return the changes that would make the run a different one.

    Args:
        resume: The user explicitly resumes the run, so its length may change.
    """
    allowed = FREE_KEYS | ROUNDING_KEYS | (set(LENGTH_KEYS) if resume else set())
    # The rows are compared after they have been read.
    return [change for change in differing if change.key not in {*allowed, "data.train"}]


def require_same_result(run: Run, config: RunConfig, log: LogFunction) -> None:
    """Reject settings with which a finished run would have a different result.

    Args:
        log: Receives messages about settings that would change only the rounding.

    Raises:
        UserError: If settings differ. Names them, and describes continuing the run and starting over.
    """
    before = {} if run.training is None else run.training["settings"]
    chosen = {key: mapping(choice).get("value") for key, choice in run.chosen.items()}
    differing = changed_settings(before, config, chosen)
    conflicting = [change for change in differing if change.key not in {*_SAME_RESULT_KEYS, "data.train"}]
    if conflicting:
        raise changed_settings_error(run.path, DONE, conflicting, resume=False)
    for change in differing:
        if change.key in ROUNDING_KEYS:
            log(f"{change}: no effect, the run is finished")


def apply_choices(config: RunConfig, before: Mapping[str, Any], choices: JSONMap) -> tuple[RunConfig, list[str]]:
    """Replace ``auto`` values that the user has not changed by the run's choices.

    Returns:
        The settings, and messages about choices that are not available here.
    """
    old_values = flat(before)
    new_values = flat(dump_settings(config))
    messages: list[str] = []
    flags: dict[str, Any] = {}
    for key in (setting.key for setting in settings()):
        if key not in choices or key in NEVER_CHOSEN or key not in new_values or new_values[key] != old_values.get(key):
            continue
        value = choices[key]
        if key == "device" and not _is_available(str(value)):
            messages.append(f"the run started on {value}, which is not available: later steps are rounded differently")
            continue
        section, _, leaf = key.rpartition(".")
        (flags.setdefault(section, {}) if section else flags)[leaf] = value
    return RunConfig.read(dump_settings(config), flags), messages


def run_choices(session: Session, loaded: Mapping[str, Choice[Any]]) -> dict[str, object]:
    """Return the automatic choices that determine the rounding of steps, by dotted key.

    Args:
        loaded: Choices of :class:`deltaw.hub.loading.LoadedModel`.
    """
    keys = {setting.key for setting in settings()}
    chosen = {key: choice.value for key, choice in {**loaded, **session.chosen}.items() if key in keys}
    feature_choice = chosen.get("train.keep_features", "off")
    return {
        **chosen,
        "train.keep_features": feature_choice not in ("off", "recomputed"),
        "train.learning_rate": session.learning_rate,
        "train.checkpointing": session.config.train.checkpointing,
    }


def require_same_model(run_identity: str | None, session: Session, run: Path) -> None:
    """Check that the model weights are the ones the run started with.

    Args:
        run_identity: Identity of the weights that the run recorded, or None.

    Raises:
        UserError: If they differ.
    """
    if run_identity is not None and session.identity is not None and run_identity != session.identity:
        message = "the model's weights have changed since the run started, so it cannot be resumed"
        hint = f"restore the model to resume, or {START_OVER_HINT}".format(run=run)
        raise UserError(message, location=f"model: {session.config.model}", hint=hint)


def require_same_start(saved: Mapping[str, Any], start: StartAdapter | None, run: Path) -> None:
    """Check that the adapters of ``start_from`` are those that the run started from.

    Args:
        saved: Values of the checkpoint.

    Raises:
        UserError: If their files have changed.
    """
    if saved.get("start") != (None if start is None else start.fingerprint):
        message = "the adapter of start_from has changed since the run started, so it cannot be resumed"
        hint = f"restore the adapter to resume, or {START_OVER_HINT}".format(run=run)
        raise UserError(message, location="start_from" if start is None else start.location, hint=hint)


def use_saved_arithmetic(arithmetic: object) -> tuple[str, ...]:
    """Select the arithmetic of a saved training state if this machine supports it. ``DELTAW_KERNELS`` takes precedence.

    If it is not supported, a warning is issued when the state is restored.

    Returns:
        Approximations of the saved state, except those disabled by environment variables.
    """
    try:
        saved = Arithmetic.from_dict(arithmetic if isinstance(arithmetic, Mapping) else {})
    except ValueError:
        return ()
    exact = saved.with_approximations(())
    if variants.kernel_overrides().kernels is None and exact != loader.arithmetic():
        with contextlib.suppress(UserError, OSError, RuntimeError, ValueError):
            loader.use_arithmetic(exact)
    return tuple(name for name in saved.approximations if variants.is_approximation_enabled(name))


def row_digests(train: Sequence[Any], held_out: Sequence[Any]) -> dict[str, object]:
    """Return the number and digest of the training and held-out rows for checkpoints."""
    parts = {"train": train, "eval": held_out}
    return {name: {"count": len(rows), "digest": digest_of_rows(rows)} for name, rows in parts.items()}


def require_same_rows(
    before: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig, run: Path, *, done: bool = False
) -> None:
    """Check that the rows are those the run started with.

    Args:
        done: True if the run is finished.

    Raises:
        UserError: If they differ. Names the setting of the rows.
    """
    for part, rows_name in (("train", "rows to train on"), ("eval", "held-out rows")):
        old_rows = before.get(part)
        new_rows = now[part]
        if old_rows == new_rows:
            continue
        counts = "" if not isinstance(old_rows, Mapping) else f"{old_rows.get('count', 0):,}"
        count = f"{new_rows['count']:,} rows instead of {counts}" if counts else "they differ"
        if isinstance(old_rows, Mapping) and old_rows.get("count") == new_rows["count"]:
            count = f"{counts} rows as before, but with different content"
        source = config.data.train if part == "train" or not isinstance(config.data.eval, str) else None
        consequence = "and the run is finished" if done else "so the run cannot be resumed"
        message = f"the {rows_name} have changed, {consequence}:\n  {count}"
        hint = f"{'' if done else 'restore the data to resume, or '}{START_OVER_HINT}".format(run=run)
        raise UserError(message, location=f"data.{part}: {source or config.data.eval}", hint=hint)


START_OVER_HINT = "start over: --fresh (moves {run}), or --output OTHER"
# Value of the ``done`` parameter for a finished run.
DONE = "done"


def changed_settings_error(run: Path, done: str, differing: Sequence[SettingChange], *, resume: bool) -> UserError:
    """Return the error for settings with which a run cannot be resumed, or would have a different result.

    Args:
        done: Progress of the run as text, or :data:`DONE` if it is finished.
    """
    flags = [f"--{c.key} {_format_value(c.now)}" for c in differing if c.key in LENGTH_KEYS and not _is_shorter(c)]
    options = [START_OVER_HINT.format(run=run)]
    if len(flags) == len(differing) and not resume:
        options.insert(0, f"deltaw train --resume {shell_word(str(run))} {' '.join(flags)}")
    elif done != DONE:
        options.insert(0, "undo the change to resume")
    lines = [*map(str, differing[:4]), *([f"and {len(differing) - 4} more"] if len(differing) > 4 else [])]
    message = f"the run in this folder is not finished ({done}) and cannot be resumed with these settings:"
    if done == DONE:
        message = "the run in this folder is finished, and was trained with other settings:"
    return UserError("\n  ".join([message, *lines]), location=str(run), hint=", or\n".join(options))


def _is_shorter(change: SettingChange) -> bool:
    before = change.before
    now = change.now
    return isinstance(before, int | float) and isinstance(now, int | float) and now < before


def _is_same_path(first: object, second: object) -> bool:
    if not isinstance(first, str) or not isinstance(second, str):
        return False
    paths = [os.path.normcase(os.path.realpath(os.path.expanduser(path))) for path in (first, second)]
    return paths[0] == paths[1] and os.path.exists(paths[0])


def _is_available(device: str) -> bool:
    try:
        choose_device(device)
    except UserError:
        return False
    return True


def _format_value(value: object) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
