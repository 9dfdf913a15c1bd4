"""Rewards: functions of completions, each a number; built in, or in a file of the user's own.

A run names them with weights (``reward.functions``). Each runs in a worker process of its own with a limit on its
time, since it may hang, leak or die: :class:`Rewarder` asks, :mod:`deltaw.training.reward_worker` answers. A reward
is a finite number, or None where a function has nothing to say of a row, which then counts 0.

A file's function, as in ``rewards.py:length``, takes ``prompts``, ``completions`` and the rows' columns by their names,
each a list, as TRL's do, and gives a list of numbers; or ``prompt``, ``completion`` and columns of one row, and gives
a number.

Knows texts and rows; no model, no tokens, no torch.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.settings import RewardFunction

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


@dataclass(frozen=True)
class Scored:
    """A completion to be rewarded.

    Attributes:
        prompt: the last turn of what was asked, as text. text: the completion, without its end mark.
        answer: the row's own answer; None if it has none.
        row: number of the row in its file. columns: of the row.
        ended: whether the model ended it, rather than the limit of its tokens.
    """

    prompt: str
    text: str
    answer: str | None
    row: int
    columns: Mapping[str, Any]
    ended: bool = True


Reward = Callable[[Sequence[Scored]], Sequence["float | None"]]


def exact(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where a completion is the right answer, but for white space at both ends."""
    wanted = [_right(settings, one) for one in given]
    return [
        None if right is None else float(one.text.strip() == right.strip())
        for one, right in zip(given, wanted, strict=True)
    ]


def contains(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the right answer stands in a completion as a word."""
    found: list[float | None] = []
    for one in given:
        right = _right(settings, one)
        pattern = None if right is None else rf"(?<!\w){re.escape(right.strip())}(?!\w)"
        found.append(None if pattern is None else float(re.search(pattern, one.text) is not None))
    return found


def regex(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the whole completion matches ``pattern``."""
    pattern = re.compile(settings.pattern or "", re.DOTALL)
    return [float(pattern.fullmatch(one.text.strip()) is not None) for one in given]


def lower_case(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where a completion has letters and none of them is a capital."""
    return [float(one.text.islower()) for one in given]


def number(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the last number of a completion is the right answer's last one, within ``tolerance``."""
    found: list[float | None] = []
    for one in given:
        right, said = _last_number(_right(settings, one)), _last_number(one.text)
        if right is None:
            found.append(None)
        else:
            found.append(float(said is not None and abs(said - right) <= settings.tolerance))
    return found


def json_schema(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where a completion is JSON of the schema."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(_schema(settings))
    return [float(_parsed(one.text) is not None and validator.is_valid(json.loads(one.text))) for one in given]


def length(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """The completion's words as a share of ``target``, at most 1; beyond it falls again."""
    target = settings.target or 1
    return [max(0.0, 1 - abs(len(one.text.split()) - target) / target) for one in given]


BUILT_IN: Mapping[str, Callable[[RewardFunction, Sequence[Scored]], list[float | None]]] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "regex": regex,
    "lower-case": lower_case,
    "json-schema": json_schema,
    "length": length,
}


def _right(settings: RewardFunction, one: Scored) -> str | None:
    """The right answer: of the named column, or the row's own."""
    if settings.column is None:
        return one.answer
    value = one.columns.get(settings.column)
    return None if value is None else str(value)


def _last_number(text: str | None) -> float | None:
    found = _NUMBER.findall(text or "")
    return float(found[-1].replace(",", "")) if found else None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _schema(settings: RewardFunction) -> Any:
    """The schema that the settings name or hold."""
    given = settings.schema_
    if isinstance(given, Mapping):
        return given
    try:
        return json.loads(Path(str(given)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        where = f"reward.functions, {settings.name}"
        raise UserError(f"the schema cannot be read: {error}", where=where, hint="name a JSON file") from error


def reward_of(settings: RewardFunction) -> Reward:
    """The function that the settings name.

    Raises:
        UserError: there is none, or its file cannot be run.
    """
    where = f"reward.functions, {settings.name}"
    file, colon, name = settings.name.rpartition(":")
    if not colon:
        if settings.name not in BUILT_IN:
            hint = f"{did_you_mean(settings.name, BUILT_IN)} a function of your own is rewards.py:name"
            raise UserError(f"there is no reward '{settings.name}'", where=where, hint=hint)
        return partial(BUILT_IN[settings.name], settings)
    spec = importlib.util.spec_from_file_location("rewards_of_the_run", Path(file).expanduser())
    if spec is None or spec.loader is None or not Path(file).expanduser().is_file():
        raise UserError(f"there is no file {file}", where=where, hint="write FILE.py:FUNCTION")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a foreign file raises
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {error}", where=where) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{file} has no function '{name}'", where=where, hint=did_you_mean(name, known))
    return partial(_of_user, function)


def _of_user(function: Callable[..., Any], given: Sequence[Scored]) -> list[float | None]:
    """What a user's function gives, for all rows at once or for one at a time, as its parameters are named."""
    takes = inspect.signature(function).parameters
    rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    named = sorted({name for one in given for name in one.columns})
    wanted = [name for name in named if rest or name in takes]
    wanted = [name for name in wanted if name not in ("prompt", "completion", "prompts", "completions")]
    if "completion" in takes:
        found = []
        for one in given:
            columns = {name: one.columns.get(name) for name in wanted}
            asked = {"prompt": one.prompt} if rest or "prompt" in takes else {}
            found.append(function(completion=one.text, **asked, **columns))
        return found
    columns = {name: [one.columns.get(name) for one in given] for name in wanted}
    asked = {"prompts": [one.prompt for one in given]} if rest or "prompts" in takes else {}
    return list(function(completions=[one.text for one in given], **asked, **columns))
