"""PEFT's rules for which names an entry means.

An entry of a list matches a full name, or the end of one after a dot; a text is a regular expression for the
full name; a key of a pattern is a regular expression for the end of a name. An entry that matches nothing is
an error that names the nearest names.
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
"""Of each entry of the settings the names that it matched."""
Pattern: TypeAlias = Mapping[str, int] | Mapping[str, float]


@dataclass(frozen=True)
class Named:
    """A module and all the names it stands under."""

    names: tuple[str, ...]
    module: nn.Module


def modules_once(model: nn.Module) -> list[Named]:
    """Every module once, with all its names, without the root."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            found.setdefault(id(module), (module, []))[1].append(name)
    return [Named(tuple(names), module) for module, names in found.values()]


def match_entries(
    key: str, wanted: str | Iterable[str], modules: list[Named], matches: Matches, strict: bool, kind: str
) -> list[Named]:
    """The modules that a text (full expression) or a list (name endings) matches.

    Args:
        key: the setting.
        wanted: its value.
        modules: what may match.
        matches: filled with the names that each entry matched.
        strict: whether an entry that matches nothing is an error.
        kind: what ``modules`` are, for that error.
    """
    if isinstance(wanted, str):
        (hit,) = names_matching(key, [wanted], (name for m in modules for name in m.names))
        found = [m for m in modules if not hit.isdisjoint(m.names)]
        if not found and strict:
            ends_so = any(wanted in endings(name) for m in modules for name in m.names)
            raise matches_nothing(key, wanted, modules, as_list=ends_so)
        matches[f"{key} '{wanted}'"] = tuple(m.names[0] for m in found)
        return found
    hits: dict[str, list[str]] = {entry: [] for entry in wanted}
    found = []
    for named in modules:
        entries = {end for name in named.names for end in endings(name) if end in hits}
        for entry in entries:
            hits[entry].append(named.names[0])
        if entries:
            found.append(named)
    for entry, names in hits.items():
        if not names and strict:
            raise matches_nothing(key, entry, modules, kind=kind)
        matches[f"{key} '{entry}'"] = tuple(names)
    return found


def endings(name: str) -> Iterator[str]:
    """``a.b.c``, ``b.c``, ``c``."""
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def match_patterns(key: str, pattern: Pattern, chosen: list[Named], matches: Matches, strict: bool) -> dict[str, float]:
    """A value for each name that a key of ``pattern`` matches; the first key that matches counts."""
    names = [named.names[0] for named in chosen]
    for entry, hit in zip(pattern, names_matching(key, pattern, names, endings=True), strict=True):
        if not hit and strict:
            raise matches_nothing(key, entry, chosen)
        matches[f"{key} '{entry}'"] = tuple(name for name in names if name in hit)
    return values_by_pattern(key, pattern, names)


def values_by_pattern(key: str, pattern: Pattern, names: Iterable[str]) -> dict[str, float]:
    """For each name whose ending a key of ``pattern`` matches, the value of the first such key.

    Args:
        key: the setting.
    """
    values: dict[str, float] = {}
    hits = names_matching(key, pattern, names, endings=True) if pattern else ()
    for entry, hit in zip(pattern, hits, strict=True):
        for name in hit:
            values.setdefault(name, pattern[entry])
    return values


def matches_nothing(
    key: str, entry: str, modules: list[Named], as_list: bool = False, kind: str = "module"
) -> UserError:
    """The error for an entry without a match, with the nearest names: last parts, else full names."""
    names = [name for m in modules for name in m.names]
    if as_list:
        hint = f"a text must match full names; for all modules that end so write a list: ['{entry}']"
    elif entry in KEYWORDS:
        hint = f"write it without a list: {key}: {entry}"
    else:
        lasts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
        lasts = [last for last in lasts if not last.isdigit()]
        full = nearest(entry, names[:2000]) if "." in entry else []
        hint = did_you_mean(entry, full or lasts)
    return UserError(f"{key}: '{entry}' matches no {kind}", where=key, hint=hint)


def shown(names: list[str], count: int = 6) -> str:
    listed = ", ".join(f"'{name}'" for name in names[:count])
    return listed + (f", … ({len(names)} in all)" if len(names) > count else "")
