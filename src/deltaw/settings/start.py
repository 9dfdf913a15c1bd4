"""The setting ``start_from``: adapters that a run starts from, with weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import WithJsonSchema

from deltaw.settings.local_names import LocalReference

# Maximum factor of an adapter's update.
MAX_WEIGHT = 1e6
_TEXT = {"type": "string", "minLength": 1}
_SECTION: dict[str, Any] = {"type": "object", "additionalProperties": False, "required": ["from"]}
_SECTION["properties"] = {"from": {**_TEXT, "description": "folder or hub id"}, "weight": {"type": "number"}}
_LIST = {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _SECTION]}}

# Type of ``start_from``: a reference, a list of references and sections {from: …, weight: …}, or None.
Sources = str | list[str | dict[str, Any]]
StartFrom = Annotated[
    Sources | None, WithJsonSchema({"anyOf": [_TEXT, _LIST, {"type": "null"}]}), LocalReference("reference")
]


@dataclass(frozen=True)
class StartSource:
    """An adapter of ``start_from``.

    Attributes:
        reference: Folder or hub id.
        weight: Factor of its update.
    """

    reference: str
    weight: float = 1.0


def start_sources(value: Sources) -> list[StartSource]:
    """Return the adapters in ``start_from``.

    Raises:
        ValueError: if the list is empty, or an entry has an unknown key or an invalid value.
    """
    listed = [value] if isinstance(value, str) else value
    entries: list[dict[str, Any]] = [{"from": entry} if isinstance(entry, str) else entry for entry in listed]
    sources = [StartSource(entry.get("from", ""), entry.get("weight", 1.0)) for entry in entries]
    for entry, source in zip(entries, sources, strict=True):
        is_number = isinstance(source.weight, int | float) and not isinstance(source.weight, bool)
        is_number = is_number and abs(source.weight) <= MAX_WEIGHT  # False for nan
        is_valid = isinstance(source.reference, str) and source.reference and entry.keys() <= {"from", "weight"}
        if not (is_valid and is_number and source.weight):
            raise ValueError("Input should be a folder, or a list such as [runs/a, {from: runs/b, weight: 0.5}]")
    if not sources:
        raise ValueError("Input should contain at least one adapter")
    return sources
