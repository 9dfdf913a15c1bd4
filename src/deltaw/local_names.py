"""Settings that name files and folders: the marks of their types, and the one walk over all of them.

A marked setting is checked for agents and shortened before it is published, without code of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

Kind = Literal["path", "reference", "code", "address"]


@dataclass(frozen=True)
class Names:
    """Marks a type whose texts name something on this machine.

    Attributes:
        kind: "path" of a file or folder; "reference", which may also be a hub id or a package; "code", FILE.py:NAME;
            "address" of a server.
    """

    kind: Kind


LocalPath = Annotated[str, Names("path")]
Reference = Annotated[str, Names("reference")]
CodeName = Annotated[str, Names("code")]
Address = Annotated[str, Names("address")]
# Receives a text, its kind and the dotted key of its setting, and returns another text.
Change = Callable[[str, Kind, str], str]


def replace_names(value: Any, annotation: Any, change: Change, key: str = "", kind: Kind | None = None) -> Any:
    """Return dumped settings with ``change`` applied to all texts of marked types.

    Args:
        value: Settings as dictionaries and lists.
        annotation: Their type: a settings class, or a type that consists of them.
        key: Dotted key of the value.
        kind: Set if the type is marked. All texts in a marked list or dictionary are names; of a source in a list,
            as ``data.train`` may have it, only the text with the key "from".
    """
    if get_origin(annotation) is Annotated:
        kind = _mark(annotation) or kind
        annotation = get_args(annotation)[0]
    if isinstance(value, str):
        kind = kind or next(filter(None, map(_mark, get_args(annotation))), None)
        return value if kind is None else change(value, kind, key)
    if isinstance(value, list):
        lists = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is list]
        inner = get_args(lists[0])[0] if lists else str
        if kind is None:
            return [replace_names(item, inner, change, key) for item in value]
        sources = [{"from": item["from"]} if isinstance(item, Mapping) and "from" in item else item for item in value]
        changed_sources = [replace_names(source, str, change, key, kind) for source in sources]
        return [
            {**item, **changed} if isinstance(item, Mapping) else changed
            for item, changed in zip(value, changed_sources, strict=True)
        ]
    if not isinstance(value, Mapping):
        return value
    if kind is not None:
        return {name: replace_names(item, str, change, key, kind) for name, item in value.items()}
    changed = dict(value)
    for section in _sections(annotation):
        for name, inner in _fields(section).items():
            if name in changed:
                changed[name] = replace_names(changed[name], inner, change, f"{key}.{name}".lstrip("."))
    return changed


def _mark(annotation: Any) -> Kind | None:
    return next((part.kind for part in get_args(annotation) if isinstance(part, Names)), None)


def _sections(annotation: Any) -> list[type]:
    """Return the settings classes among a type and the members of a union."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)]


def _fields(section: type) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        fields = section.model_fields.items()
        return {name: Annotated[(field.annotation, None, *field.metadata)] for name, field in fields}
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}  # type: ignore[arg-type]
