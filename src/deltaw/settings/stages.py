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

Other keys of the file apply to all stages. A stage starts from the previous one unless it has ``start_from``, which is
the name of a stage, a folder, a hub id, a list of them, or null for a new adapter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.settings.config import STAGES, RunConfig, merge_settings, read_yaml

NAME, START_FROM = "name", "start_from"
# Keys of the file that apply to the first stage only.
_FIRST_STAGE_KEYS = (START_FROM, "start_mode", "stack")
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
    values = merge_settings(values, flags or {})
    entries = _entries(listed, location)
    names = [entry[NAME] for entry in entries]
    folder = Path(os.path.expanduser(str(values.pop("output", None) or "runs/chain")))
    first = {key: values.pop(key) for key in _FIRST_STAGE_KEYS if key in values}
    _check_references(entries, names, location)
    _check_order({entry[NAME]: _parents(entry, names, previous) for entry, previous in _pairs(entries)}, location)
    stages = []
    for entry, previous in _pairs(entries):
        own = {key: value for key, value in entry.items() if key != NAME}
        if previous is None:
            own = {**first, **own}
        ignored = ("output",) if previous is None else ("output", START_FROM)
        overrides = {key: value for key, value in (flags or {}).items() if key not in ignored}
        own = merge_settings(merge_settings(values, own), overrides)
        own.setdefault(START_FROM, previous)
        own[START_FROM] = _map_references(own[START_FROM], lambda text: str(folder / text) if text in names else text)
        own["output"] = str(folder / entry[NAME])
        try:
            config = RunConfig.read(own)
        except UserError as error:
            inner = (error.location or "").removeprefix("the settings").removeprefix(": ")
            where = ": ".join(filter(None, (f"{location}, stage '{entry[NAME]}'", inner)))
            raise UserError(error.message, location=where, hint=error.hint) from error
        stages.append(Stage(entry[NAME], config, tuple(_parents(entry, names, previous))))
    return Chain(folder, location, tuple(stages))


def _pairs(entries: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], str | None]]:
    """Return each stage with the name of the previous one."""
    return list(zip(entries, [None, *(entry[NAME] for entry in entries)], strict=False))


def _entries(listed: object, location: str) -> list[dict[str, Any]]:
    """Return the stages of a file with valid, unique names."""
    example = "write stages: [{name: sft, data: rows.jsonl}, {name: dpo, task: dpo, data: pairs.jsonl}]"
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise UserError("'stages' is not a list of stages", location=location, hint=example)
    names: set[str] = set()
    for number, entry in enumerate(listed, 1):
        name, where = entry.get(NAME), f"{location}: stage {number}"
        if not isinstance(name, str) or not re.fullmatch(VALID_NAME, name):
            message = "the stage has no name" if name is None else f"{name!r} cannot be the name of a stage"
            hint = "give a name of up to 64 letters, digits, '_' and '-', which is also the name of its folder"
            raise UserError(message, location=where, hint=hint)
        if name.lower() in names:
            raise UserError(f"two stages have the name '{name}'", location=where, hint="give each stage its own name")
        if invalid := sorted({STAGES, "output"} & entry.keys()):
            hint = "set 'output' outside of the stages; each stage gets a folder inside it"
            raise UserError(f"a stage cannot have the key '{invalid[0]}'", location=where, hint=hint)
        names.add(name.lower())
    return listed


def _check_references(entries: Sequence[Mapping[str, Any]], names: Sequence[str], location: str) -> None:
    """Check that each ``start_from`` is a stage, an existing folder, or a hub id.

    Raises:
        UserError: if it is none of them.
    """
    for entry in entries:
        for reference in _references(entry.get(START_FROM)):
            if reference not in names and "/" not in reference and not Path(os.path.expanduser(reference)).is_dir():
                message = f"there is no stage and no folder '{reference}' to start from"
                where = f"{location}, stage '{entry[NAME]}': {START_FROM}"
                raise UserError(message, location=where, hint=did_you_mean(reference, names))


def _references(value: Any) -> list[str]:
    """Return the references in a value of ``start_from``."""
    found: list[str] = []

    def collect(reference: str) -> str:
        found.append(reference)
        return reference

    _map_references(value, collect)
    return found


def _parents(entry: Mapping[str, Any], names: Sequence[str], previous: str | None) -> list[str]:
    """Return the stages that a stage starts from."""
    return [name for name in _references(entry.get(START_FROM, previous)) if name in names]


def _map_references(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value of ``start_from`` with changed references. Invalid values are returned unchanged."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_references(entry, change) for entry in value]
    if isinstance(value, dict) and isinstance(value.get("from"), str):
        return {**value, "from": change(value["from"])}
    return value


def _check_order(parents: Mapping[str, Sequence[str]], location: str) -> None:
    """Check that each stage starts from earlier stages.

    Raises:
        UserError: if stages start from each other, or a stage precedes its parent.
    """
    for name in parents:
        path, seen = name, [name]
        while (parent := next(iter(parents[path]), None)) is not None:
            seen.append(parent)
            if parent in seen[:-1]:
                message = f"stages start from each other: {' → '.join(reversed(seen))}"
                raise UserError(message, location=location, hint="remove start_from of the first stage")
            path = parent
    earlier: list[str] = []
    for name, sources in parents.items():
        if later := [source for source in sources if source not in earlier]:
            message = f"the stage '{name}' starts from '{later[0]}', which is trained later"
            raise UserError(message, location=location, hint=f"list '{later[0]}' before '{name}'")
        earlier.append(name)
