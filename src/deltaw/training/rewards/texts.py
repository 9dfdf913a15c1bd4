"""Rewards that texts alone decide: the right answer, a number, a pattern, a schema, the case, the length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, first_line
from deltaw.task_settings import RewardFunction, refuse_remote_references
from deltaw.training.rewards.base import Scored, needs_extra, place_of, right_answer

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def exact(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where a completion is the right answer, but for white space at both ends."""
    wanted = [right_answer(settings, one) for one in given]
    return [
        None if right is None else float(one.text.strip() == right.strip())
        for one, right in zip(given, wanted, strict=True)
    ]


def contains(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the right answer stands in a completion as a word."""
    found: list[float | None] = []
    for one in given:
        right = right_answer(settings, one)
        pattern = None if right is None else rf"(?<!\w){re.escape(right.strip())}(?!\w)"
        found.append(None if pattern is None else float(re.search(pattern, one.text) is not None))
    return found


def regex(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the whole completion matches ``pattern``."""
    pattern = re.compile(settings.pattern or "", re.DOTALL)
    return [float(pattern.fullmatch(one.text.strip()) is not None) for one in given]


def lower_case(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """The share of a completion's letters that are in lower case; 0 where it has none."""
    letters = [[c for c in one.text if c.isupper() or c.islower()] for one in given]
    return [sum(map(str.islower, each)) / max(1, len(each)) for each in letters]


def number(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the last number of a completion is the right answer's last one, within ``tolerance``."""
    found: list[float | None] = []
    for one in given:
        right, said = last_number(right_answer(settings, one)), last_number(one.text)
        if right is None:
            found.append(None)
        else:
            found.append(float(said is not None and abs(said - right) <= settings.tolerance))
    return found


def json_schema(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """Return 1 for each completion that is JSON of the schema, 0.5 for other JSON.

    Raises:
        UserError: if the package is missing, or if the schema cannot be used.
    """
    validator = schema_validator(settings)
    return [_schema_reward(validator, one.text) for one in given]


def _schema_reward(validator: Any, text: str) -> float:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    try:
        return 1.0 if validator.is_valid(value) else 0.5
    except (RecursionError, ArithmeticError):  # of a value that is nested too deeply, or infinite
        return 0.5


def schema_validator(settings: RewardFunction) -> Any:
    """Return the validator of a json-schema reward. It fetches nothing: references lead into the schema itself.

    Raises:
        UserError: if the package is missing, or if the schema cannot be read, is not valid or refers to others.
    """
    try:
        from jsonschema import Draft202012Validator, SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise needs_extra("jsonschema", error, place_of(settings)) from error
    schema = _schema(settings)
    refuse_remote_references(schema, place_of(settings))
    kind: Any = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        what = f"the schema is not valid at {error.json_path}: {error.message[:200]}"
        raise UserError(what, where=place_of(settings), hint="correct the schema") from error
    validator = kind(schema, registry=Registry())
    try:
        examples: tuple[object, ...] = (None, True, 0, "", [], {})
        for example in examples:  # a reference that leads nowhere, or to itself, fails for any value
            validator.is_valid(example)
    except (RecursionError, Unresolvable) as error:
        what = f"the schema refers to nothing, or to itself: {first_line(error)}"
        raise UserError(what, where=place_of(settings), hint="correct its $ref") from error
    return validator


def length(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """The completion's words as a share of ``target``, at most 1; beyond it falls again."""
    target = settings.target or 1
    return [max(0.0, 1 - abs(len(one.text.split()) - target) / target) for one in given]


def last_number(text: str | None) -> float | None:
    """The last number that stands in a text; None where there is none."""
    found = _NUMBER.findall(text or "")
    return float(found[-1].replace(",", "")) if found else None


def _schema(settings: RewardFunction) -> Any:
    """The schema that the settings name or hold."""
    given = settings.schema_
    if isinstance(given, Mapping):
        return given
    try:
        return json.loads(Path(str(given)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"the schema cannot be read: {error}"
        raise UserError(what, where=place_of(settings), hint="name a JSON file") from error
