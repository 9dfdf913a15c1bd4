"""Match entries of the settings to module names by PEFT's rules.

An entry of a list matches a full name, or the end of a name after a dot. A string is a regular expression for the full
name. A key of a pattern is a regular expression for the end of a name. An entry without a match is an error that
suggests similar names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from deltaw.errors import UserError, did_you_mean, nearest
from deltaw.lora.config import KEYWORDS
from deltaw.lora.expressions import matches as names_matching

Matches: TypeAlias = dict[str, tuple[str, ...]]
"""Matched names by entry of the settings."""
Pattern: TypeAlias = Mapping[str, int] | Mapping[str, float]


@dataclass(frozen=True)
class NamedModule:
    """A module and all of its names."""

    names: tuple[str, ...]
    module: nn.Module


def unique_modules(model: nn.Module) -> list[NamedModule]:
    """Return every module once with all its names, without the root."""
    names_by_id: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            names_by_id.setdefault(id(module), (module, []))[1].append(name)
    return [NamedModule(tuple(names), module) for module, names in names_by_id.values()]


def match_entries(
    key: str, value: str | Iterable[str], modules: list[NamedModule], matches: Matches, strict: bool, kind: str
) -> list[NamedModule]:
    """Return the modules that match a string (full expression) or a list (name endings).

    Args:
        key: Name of the setting.
        value: Value of the setting.
        modules: Modules that can match.
        matches: Receives the matched names of each entry.
        strict: If True, an entry without a match is an error.
        kind: Kind of ``modules`` for that error.
    """
    if isinstance(value, str):
        (matched_names,) = names_matching(key, [value], (name for m in modules for name in m.names))
        matched = [m for m in modules if not matched_names.isdisjoint(m.names)]
        if not matched and strict:
            is_ending = any(value in endings(name) for m in modules for name in m.names)
            raise no_match_error(key, value, modules, as_list=is_ending)
        matches[f"{key} '{value}'"] = tuple(m.names[0] for m in matched)
        return matched
    names_by_entry: dict[str, list[str]] = {entry: [] for entry in value}
    matched = []
    for entry_module in modules:
        entries = {end for name in entry_module.names for end in endings(name) if end in names_by_entry}
        for entry in entries:
            names_by_entry[entry].append(entry_module.names[0])
        if entries:
            matched.append(entry_module)
    for entry, names in names_by_entry.items():
        if not names and strict:
            raise no_match_error(key, entry, modules, kind=kind)
        matches[f"{key} '{entry}'"] = tuple(names)
    return matched


def endings(name: str) -> Iterator[str]:
    """Yield ``a.b.c``, ``b.c``, ``c``."""
    yield name
    position = name.find(".")
    while position >= 0:
        yield name[position + 1 :]
        position = name.find(".", position + 1)


def match_patterns(
    key: str, pattern: Pattern, modules: list[NamedModule], matches: Matches, strict: bool
) -> dict[str, float]:
    """Return the value of the first matching key of ``pattern`` for each matched name."""
    names = [named_module.names[0] for named_module in modules]
    for entry, matched in zip(pattern, names_matching(key, pattern, names, endings=True), strict=True):
        if not matched and strict:
            raise no_match_error(key, entry, modules)
        matches[f"{key} '{entry}'"] = tuple(name for name in names if name in matched)
    return values_by_pattern(key, pattern, names)


def values_by_pattern(key: str, pattern: Pattern, names: Iterable[str]) -> dict[str, float]:
    """Return the value of the first matching key of ``pattern`` for each name whose ending matches a key.

    Args:
        key: Name of the setting.
        pattern: Values by regular expression.
        names: Names to match.
    """
    values: dict[str, float] = {}
    matches = names_matching(key, pattern, names, endings=True) if pattern else ()
    for entry, matched in zip(pattern, matches, strict=True):
        for name in matched:
            values.setdefault(name, pattern[entry])
    return values


def no_match_error(
    key: str, entry: str, modules: list[NamedModule], as_list: bool = False, kind: str = "module"
) -> UserError:
    """Return the error for an entry without a match, with a hint that suggests similar names."""
    names = [name for m in modules for name in m.names]
    if as_list:
        hint = f"a string must match full names; to match name endings, use a list: ['{entry}']"
    elif entry in KEYWORDS:
        hint = f"use it without a list: {key}: {entry}"
    else:
        last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        last_parts = [last for last in last_parts if not last.isdigit()]
        full = nearest(entry, names[:2000]) if "." in entry else []
        hint = did_you_mean(entry, full or last_parts)
    return UserError(f"{key}: '{entry}' matches no {kind}", location=key, hint=hint)


def format_names(names: list[str], count: int = 6) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:count])
    return listed + (f", … ({len(names)} in all)" if len(names) > count else "")
