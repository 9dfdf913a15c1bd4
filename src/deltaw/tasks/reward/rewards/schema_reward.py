"""Reward for JSON that conforms to a schema."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, first_line
from deltaw.tasks.reward.rewards.functions import Completion, missing_package_error, settings_location
from deltaw.tasks.reward.settings import RewardFunction, refuse_remote_references


def json_schema(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if a completion is JSON that conforms to the schema, 0.5 for other JSON, and 0 otherwise.

    Raises:
        UserError: if the package is missing, or the schema is unusable.
    """
    validator = schema_validator(settings)
    return [_schema_reward(validator, completion.text) for completion in completions]


def _schema_reward(validator: Any, text: str) -> float:
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return 0.0
    try:
        return 1.0 if validator.is_valid(value) else 0.5
    except (RecursionError, ArithmeticError):  # deeply nested or infinite value
        return 0.5


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object with these keys, and reject a repeated key, whose value depends on the reader."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _finite(text: str) -> float:
    """Return a finite number. NaN and Infinity are not JSON, and 1e999 becomes infinity."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def schema_validator(settings: RewardFunction) -> Any:
    """Return the validator of a json-schema reward. It does not fetch remote references.

    Raises:
        UserError: if the package is missing, or the schema is unreadable, invalid or has remote references.
    """
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import extend, validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise missing_package_error("jsonschema", error, settings_location(settings)) from error
    schema = _schema(settings)
    refuse_remote_references(schema, settings_location(settings))
    validator_class: Any = validator_for(schema, default=Draft202012Validator)
    try:
        validator_class.check_schema(schema)
    except SchemaError as error:
        message = f"the schema is not valid at {error.json_path}: {error.message[:200]}"
        raise UserError(message, location=settings_location(settings), hint="correct the schema") from error
    validator_class = extend(validator_class, {"multipleOf": _multiple_of})
    validator = validator_class(schema, registry=Registry(), format_checker=validator_class.FORMAT_CHECKER)
    try:
        examples: tuple[object, ...] = (None, True, 0, "", [], {})
        for example in examples:  # an unresolvable or circular reference fails for any value
            validator.is_valid(example)
    except (RecursionError, Unresolvable) as error:
        message = f"the schema has an unresolvable or circular reference: {first_line(error)}"
        raise UserError(message, location=settings_location(settings), hint="correct its $ref") from error
    return validator


def _multiple_of(validator: Any, divisor: float, value: Any, schema: object) -> Iterator[Exception]:
    """Yield an error if a number is not a multiple of another as both are written, so that 0.3 is one of 0.1."""
    from jsonschema import ValidationError

    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(divisor)):
        yield ValidationError(f"{value} is not a multiple of {divisor}")


def _schema(settings: RewardFunction) -> Any:
    """Return the schema, either inline or from a file."""
    source = settings.schema_
    if isinstance(source, Mapping):
        return source
    try:
        return json.loads(Path(str(source)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"the schema cannot be read: {error}"
        raise UserError(message, location=settings_location(settings), hint="use a JSON file") from error
