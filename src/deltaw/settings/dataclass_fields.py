"""Fields of settings sections that are dataclasses. Requires only the standard library, because ``lora`` uses it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def dataclass_setting(default: Any, description: str, **schema: Any) -> Any:
    """Return a dataclass field of a settings class.

    Args:
        default: Default value, or ``dict`` or ``list`` for an empty one.
        description: Description for ``--help``.
        schema: Additions to the JSON schema that the type does not imply.
    """
    metadata = {"description": description, **({"json_schema_extra": schema} if schema else {})}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
