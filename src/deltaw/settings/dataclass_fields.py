"""Fields of settings sections that are dataclasses. Requires only the standard library, because ``lora`` uses it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def dataclass_setting(default: Any, description: str, when: str = "", **schema: Any) -> Any:
    """Return a dataclass field of a settings class.

    Args:
        default: Default value, or ``dict`` or ``list`` for an empty one.
        description: Description for ``--help``.
        when: Sentence on when to change the setting, to which value, and what that costs.
        schema: Additions to the JSON schema that the type does not imply.
    """
    schema = {**schema, "when": when} if when else schema
    metadata = {"description": description, **({"json_schema_extra": schema} if schema else {})}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
