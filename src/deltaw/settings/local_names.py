"""Settings that refer to files, folders or servers: type markers, and a function that visits all of them.

Marked settings are checked for agents and shortened before publication without separate code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel

Kind = Literal["path", "reference", "code", "address"]


@dataclass(frozen=True)
class LocalReference:
    """Marker of a type with values that refer to something on this machine.

    Attributes:
        kind: "path" of a file or folder, "reference" (a path, a hub id or a package), "code" (FILE.py:NAME), or
            "address" of a server.
    """

    kind: Kind


LocalPath = Annotated[str, LocalReference("path")]
Reference = Annotated[str, LocalReference("reference")]
CodeName = Annotated[str, LocalReference("code")]
Address = Annotated[str, LocalReference("address")]
# Takes a value, its kind and the dotted key of its setting, and returns the replacement.
Change = Callable[[str, Kind, str], str]


def replace_names(value: Any, annotation: Any, change: Change, key: str = "", kind: Kind | None = None) -> Any:
    """Return dumped settings with ``change`` applied to all values of marked types.

    Args:
        value: Settings as dictionaries and lists.
        annotation: Type of the value: a settings class, or a type that contains settings classes.
        change: Function that returns the replacement of a value.
        key: Dotted key of the value.
        kind: Kind of the marked type, if any. It applies to all strings in a marked list or dictionary. In the sources
            of a list such as ``data.train``, it applies only to the value of "from".
    """
    if get_origin(annotation) is Annotated:
        kind = _mark(annotation) or kind
        annotation = get_args(annotation)[0]
    if isinstance(value, str):
        kind = kind or next(filter(None, map(_mark, get_args(annotation))), None)
        return value if kind is None else change(value, kind, key)
    if isinstance(value, list):
        lists = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is list]
        item_type = get_args(lists[0])[0] if lists else str
        if kind is None:
            return [replace_names(item, item_type, change, key) for item in value]
        sources = [{"from": item["from"]} if isinstance(item, Mapping) and "from" in item else item for item in value]
        changed_sources = [replace_names(source, str, change, key, kind) for source in sources]
        pairs = zip(value, changed_sources, strict=True)
        return [{**item, **changed} if isinstance(item, Mapping) else changed for item, changed in pairs]
    if not isinstance(value, Mapping):
        return value
    if kind is not None:
        return {name: replace_names(item, str, change, key, kind) for name, item in value.items()}
    changed = dict(value)
    for section in _sections(annotation):
        for name, item_type in _fields(section).items():
            if name in changed:
                changed[name] = replace_names(changed[name], item_type, change, f"{key}.{name}".lstrip("."))
    return changed


def _mark(annotation: Any) -> Kind | None:
    return next((part.kind for part in get_args(annotation) if isinstance(part, LocalReference)), None)


def _sections(annotation: Any) -> list[type]:
    """Return the settings classes in a type or a union."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return [kind for kind in kinds if issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)]


def _fields(section: type) -> dict[str, Any]:
    if issubclass(section, BaseModel):
        fields = section.model_fields.items()
        return {name: Annotated[(field.annotation, None, *field.metadata)] for name, field in fields}
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}  # type: ignore[arg-type]
