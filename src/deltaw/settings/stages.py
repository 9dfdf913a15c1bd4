"""Settings files with ``stages``: several runs, each of which starts from an earlier one.

Example::

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    output: runs/chain
    stages:
      - name: sft
        data: rows.jsonl
      - name: dpo
        task: dpo
        data: pairs.jsonl

Other keys of the file apply to all stages, except that ``start_from`` applies to the first one. A later stage starts
from the previous one unless it has ``start_from``: the name of an earlier stage, a folder, a hub id, a list of them, or
null for a new adapter.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw import platforms
from deltaw.errors import UserError, did_you_mean
from deltaw.settings.config import STAGES, RunConfig, merge_settings, read_yaml

DEFAULT_FOLDER = "runs/chain"
NAME = "name"
START_FROM = "start_from"
# Names of files and folders that a chain's folder contains besides those of the stages.
_RESERVED_NAMES = ("base", "pieces", "logs")
VALID_NAME = "[A-Za-z0-9][A-Za-z0-9_-]{0,63}"


@dataclass(frozen=True)
class Stage:
    """Run of a chain.

    Attributes:
        name: Name, which is also the name of its folder.
        config: Settings.
        parents: Names of the stages that it starts from.
    """

    name: str
    config: RunConfig
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """Runs of a settings file.

    Attributes:
        folder: Folder with the runs and the report.
        location: Name of the file for messages.
        stages: The runs in order.
    """

    folder: Path
    location: str
    stages: tuple[Stage, ...]


def read_chain(
    source: str | os.PathLike[str] | Mapping[str, Any], flags: Mapping[str, Any] | None = None
) -> Chain | None:
    """Read a settings file with stages.

    Args:
        source: Path of the file, or its content.
        flags: Nested values that override those of all stages. ``start_from`` applies to the first stage, and
            ``output`` is the folder of the chain.

    Returns:
        The chain, or None if the file has no stages.

    Raises:
        UserError: if a stage is invalid, or starts from a stage that is unknown or not an earlier one.
    """
    location = "the settings" if isinstance(source, Mapping) else os.fspath(source)
    values = dict(source) if isinstance(source, Mapping) else read_yaml(Path(source))
    listed = values.pop(STAGES, None)
    if listed is None:
        return None
    flags = flags or {}
    folder = _folder({"output": DEFAULT_FOLDER, **values, **flags}["output"], location)
    if NAME in values:
        raise UserError(f"the key '{NAME}' is only for stages", location=location, hint="remove it")
    entries = _with_start(_entries(listed, location), values.pop(START_FROM, None), flags.get(START_FROM))
    names = [entry[NAME] for entry in entries]
    paths = {(folder / name).resolve(): name for name in names}
    for entry in entries:  # a stage can also be given by its folder
        platforms.reject_reserved_names(folder / entry[NAME])
        entry[START_FROM] = map_references(entry[START_FROM], lambda text: paths.get(_resolved(text), text))
    _check_references(entries, location)
    overrides = {key: value for key, value in flags.items() if key not in ("output", START_FROM)}
    stages = []
    for entry in entries:
        settings = merge_settings(merge_settings(values, entry), overrides)
        name = settings.pop(NAME)
        start_from = map_references(entry[START_FROM], lambda text: str(folder / text) if text in names else text)
        settings |= {START_FROM: start_from, "output": str(folder / name)}
        try:
            config = RunConfig.read(settings)
        except UserError as error:
            inner = (error.location or "").removeprefix("the settings").removeprefix(": ")
            raise at_stage(error, location, name, inner) from error
        stages.append(Stage(name, config, tuple(_parents(entry, names))))
    return Chain(folder, location, tuple(stages))


def _folder(output: object, location: str) -> Path:
    """Return the folder of a chain."""
    if not isinstance(output, str) or not output or "\0" in output:
        message = f"'output' cannot be {output!r}"
        raise UserError(message, location=location, hint="give the path of a folder, such as runs/chain")
    return Path(os.path.expanduser(output))


def _resolved(reference: str) -> Path | None:
    """Return the path of a folder, or None if the reference cannot be one."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return Path(os.path.expanduser(reference)).resolve()
    return None


def at_stage(error: UserError, location: str, stage: str, inner: str | None) -> UserError:
    """Return an error with the name of the stage in its location."""
    full_location = f"{location}, stage '{stage}'" + (f": {inner}" if inner else "")
    return UserError(error.message, location=full_location, hint=error.hint)


def _with_start(entries: Sequence[dict[str, Any]], shared: Any, flag: Any) -> list[dict[str, Any]]:
    """Return the stages with the value of ``start_from`` that applies to each.

    Args:
        entries: Stages of the file.
        shared: Value outside of the stages, the default of the first stage.
        flag: Value of the flag, which overrides that of the first stage.
    """
    first, *others = entries
    started = [{**first, START_FROM: flag or first.get(START_FROM, shared)}]
    for entry in others:
        started.append({START_FROM: started[-1][NAME], **entry})
    return started


def _entries(listed: object, location: str) -> list[dict[str, Any]]:
    """Return the stages of a file with valid, unique names."""
    example = "write stages: [{name: sft, data: rows.jsonl}, {name: dpo, task: dpo, data: pairs.jsonl}]"
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise UserError("'stages' is not a list of stages", location=location, hint=example)
    names: set[str] = set()
    for number, entry in enumerate(listed, 1):
        name = entry.get(NAME)
        where = f"{location}: stage {number}"
        if not isinstance(name, str) or not re.fullmatch(VALID_NAME, name):
            message = "the stage has no name" if name is None else f"{name!r} cannot be the name of a stage"
            hint = "give a name of up to 64 letters, digits, '_' and '-', which is also the name of its folder"
            raise UserError(message, location=where, hint=hint)
        if name.lower() in _RESERVED_NAMES:
            raise UserError(f"'{name}' cannot be the name of a stage", location=where, hint="choose another name")
        if name.lower() in names:
            raise UserError(f"two stages have the name '{name}'", location=where, hint="give each stage its own name")
        if invalid := sorted({STAGES, "output"} & entry.keys()):
            hint = "set 'output' outside of the stages; each stage gets a folder inside it"
            raise UserError(f"a stage cannot have the key '{invalid[0]}'", location=where, hint=hint)
        names.add(name.lower())
    return listed


def _check_references(entries: Sequence[Mapping[str, Any]], location: str) -> None:
    """Check that each ``start_from`` is an earlier stage, an existing folder, or a hub id.

    Raises:
        UserError: if it is not.
    """
    names = [entry[NAME] for entry in entries]
    earlier = set[str]()
    for entry in entries:
        for reference in _references(entry[START_FROM]):
            where = f"{location}, stage '{entry[NAME]}': {START_FROM}"
            if reference in names and reference not in earlier:
                later = "itself" if reference == entry[NAME] else f"'{reference}', which is not an earlier stage"
                message = f"the stage '{entry[NAME]}' starts from {later}"
                raise UserError(message, location=where, hint="list a stage after those that it starts from")
            if reference not in names and "/" not in reference and not Path(os.path.expanduser(reference)).is_dir():
                message = f"there is no stage and no folder '{reference}' to start from"
                raise UserError(message, location=where, hint=did_you_mean(reference, names))
        earlier.add(entry[NAME])


def _references(value: Any) -> list[str]:
    """Return the references in a value of ``start_from``."""
    found: list[str] = []

    def collect(reference: str) -> str:
        found.append(reference)
        return reference

    map_references(value, collect)
    return found


def _parents(entry: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return the stages that a stage starts from."""
    return [reference for reference in _references(entry[START_FROM]) if reference in names]


def map_references(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of ``start_from`` with changed references. Invalid values are returned unchanged."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_references(entry, change) for entry in value]
    if isinstance(value, dict) and isinstance(value.get("from"), str):
        return {**value, "from": change(value["from"])}
    return value
