"""References to a vision-language model that consists of a language model and a vision encoder.

The reference is ``parts:LANGUAGE + VISION`` with a linear connector, and ``parts:LANGUAGE + VISION + mlp`` with another
one. In settings it can be written as a mapping, ``{language: LANGUAGE, vision: VISION, connector: linear}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

from deltaw.errors import UserError, did_you_mean
from deltaw.settings.local_names import Reference

CONNECTORS = ("linear", "mlp")
_PREFIX = "parts:"
_SEPARATOR = " + "
_KEYS = ("language", "vision", "connector")


@dataclass(frozen=True)
class ModelParts:
    """Parts of a vision-language model.

    Attributes:
        language: Reference of the language model.
        vision: Reference of the vision encoder.
        connector: Connector between them, which is initialized randomly: one of :data:`CONNECTORS`.
    """

    language: str
    vision: str
    connector: str = CONNECTORS[0]

    @property
    def reference(self) -> str:
        """Reference of the complete model."""
        connector = [] if self.connector == CONNECTORS[0] else [self.connector]
        return _PREFIX + _SEPARATOR.join([self.language, self.vision, *connector])

    def replace_references(self, change: Callable[[str], str]) -> ModelParts:
        """Return a copy with ``change`` applied to both references."""
        return ModelParts(change(self.language), change(self.vision), self.connector)


def parse_parts(reference: str) -> ModelParts | None:
    """Return the parts that a model reference names, or None if it names a single model.

    Raises:
        UserError: if the reference is malformed.
    """
    if not reference.startswith(_PREFIX):
        return None
    names = [name.strip() for name in reference.removeprefix(_PREFIX).split(_SEPARATOR)]
    if not 2 <= len(names) <= 3 or not all(names) or any(name.startswith(_PREFIX) for name in names):
        raise UserError(
            "the reference does not name a language model and a vision encoder",
            location=f"model: {reference}",
            hint="write parts:LANGUAGE + VISION, with spaces around the plus sign",
        )
    if names[2:] and names[2] not in CONNECTORS:
        raise UserError(f"unknown connector '{names[2]}'", location="model", hint=did_you_mean(names[2], CONNECTORS))
    return ModelParts(*names)


def model_reference(value: object) -> object:
    """Return the reference for a value of the setting ``model``. Values of other types are returned unchanged.

    Raises:
        UserError: if a mapping has unknown or missing keys, or invalid values.
    """
    if isinstance(value, str):
        parts = parse_parts(value.strip())
        return value if parts is None else parts.reference
    if not isinstance(value, Mapping):
        return value
    if unknown := [str(key) for key in value if key not in _KEYS]:
        message = f"unknown key 'model.{unknown[0]}'"
        raise UserError(message, location="model", hint=did_you_mean(unknown[0], _KEYS))
    names = [value.get("language"), value.get("vision"), value.get("connector", CONNECTORS[0])]
    texts = [name for name in names if isinstance(name, str)]
    if len(texts) < len(names):
        hint = "write model: {language: LANGUAGE, vision: VISION}, each a folder, hub id or pypi:package==version"
        raise UserError("a model of parts needs a language model and a vision encoder", location="model", hint=hint)
    return model_reference(_PREFIX + _SEPARATOR.join(texts))


_TEXT = {"type": "string", "minLength": 1}
_PROPERTIES = {"language": _TEXT, "vision": _TEXT, "connector": {"enum": [*CONNECTORS]}}
_MAPPING = {"type": "object", "properties": _PROPERTIES, "required": [*_KEYS[:2]], "additionalProperties": False}

# Type of a setting that is a model or a mapping of its parts. Saved settings contain the reference.
ModelReference = Annotated[
    Reference, BeforeValidator(model_reference), WithJsonSchema({"anyOf": [_TEXT, _MAPPING]})  # type: ignore[dict-item]
]
