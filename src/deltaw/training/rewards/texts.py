"""Rewards that depend only on texts: expected answer, number, pattern, JSON schema, case and length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, first_line
from deltaw.task_settings import RewardFunction, refuse_remote_references
from deltaw.training.rewards.base import Completion, expected_answer, missing_package_error, settings_location

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def exact(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if a completion equals the expected answer, ignoring surrounding white space."""
    answers = [expected_answer(settings, completion) for completion in completions]
    pairs = zip(completions, answers, strict=True)
    return [None if answer is None else float(c.text.strip() == answer.strip()) for c, answer in pairs]


def contains(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if a completion contains the expected answer as a word."""
    rewards: list[float | None] = []
    for completion in completions:
        answer = expected_answer(settings, completion)
        pattern = None if answer is None else rf"(?<!\w){re.escape(answer.strip())}(?!\w)"
        rewards.append(None if pattern is None else float(re.search(pattern, completion.text) is not None))
    return rewards


def regex(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if the entire completion matches ``pattern``."""
    pattern = re.compile(settings.pattern or "", re.DOTALL)
    return [float(pattern.fullmatch(completion.text.strip()) is not None) for completion in completions]


def lower_case(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return the share of lower-case letters of a completion, or 0 if it has no letters."""
    letters = [[c for c in completion.text if c.isupper() or c.islower()] for completion in completions]
    return [sum(map(str.islower, row_letters)) / max(1, len(row_letters)) for row_letters in letters]


def number(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if the last numbers of completion and expected answer are equal within ``tolerance``."""
    rewards: list[float | None] = []
    for completion in completions:
        expected, actual = last_number(expected_answer(settings, completion)), last_number(completion.text)
        if expected is None:
            rewards.append(None)
        else:
            rewards.append(float(actual is not None and abs(actual - expected) <= settings.tolerance))
    return rewards


def json_schema(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if a completion is JSON that conforms to the schema, 0.5 for other JSON, and 0 otherwise.

    Raises:
        UserError: if the package is missing, or the schema is unusable.
    """
    validator = schema_validator(settings)
    return [_schema_reward(validator, completion.text) for completion in completions]


def _schema_reward(validator: Any, text: str) -> float:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    try:
        return 1.0 if validator.is_valid(value) else 0.5
    except (RecursionError, ArithmeticError):  # deeply nested or infinite value
        return 0.5


def schema_validator(settings: RewardFunction) -> Any:
    """Return the validator of a json-schema reward. It does not fetch remote references.

    Raises:
        UserError: if the package is missing, or the schema is unreadable, invalid or has remote references.
    """
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
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
    validator = validator_class(schema, registry=Registry())
    try:
        examples: tuple[object, ...] = (None, True, 0, "", [], {})
        for example in examples:  # an unresolvable or circular reference fails for any value
            validator.is_valid(example)
    except (RecursionError, Unresolvable) as error:
        message = f"the schema has an unresolvable or circular reference: {first_line(error)}"
        raise UserError(message, location=settings_location(settings), hint="correct its $ref") from error
    return validator


def length(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return the number of words as a share of ``target``. Beyond the target, the reward decreases to 0."""
    target = settings.target or 1
    return [max(0.0, 1 - abs(len(completion.text.split()) - target) / target) for completion in completions]


def last_number(text: str | None) -> float | None:
    """Return the last number of a text, or None."""
    numbers = _NUMBER.findall(text or "")
    return float(numbers[-1].replace(",", "")) if numbers else None


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
