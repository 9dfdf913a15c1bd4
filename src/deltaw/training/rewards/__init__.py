"""Rewards: functions of completions, each a number; built in, or in a file of the user's own.

A run names them with weights (``reward.functions``). Each runs in a worker process of its own with a limit on its
time, since it may hang, leak or die: :class:`deltaw.training.rewards.rewarder.Rewarder` asks. A reward is a finite
number, or None where a function has nothing to say of a row, which then counts 0.

A file's function, as in ``rewards.py:length``, takes ``prompts``, ``completions`` and the rows' columns by their names,
each a list, as TRL's do, and returns a list of numbers; or ``prompt``, ``completion`` and columns of one row, and
returns a number. ``answer`` is the row's own answer, unless a column has this name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from deltaw.errors import UserError, did_you_mean, read_key
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Reward, Scored, from_file, place_of
from deltaw.training.rewards.judge import judge
from deltaw.training.rewards.libraries import math_answer, reasoning_gym
from deltaw.training.rewards.texts import (
    contains,
    exact,
    json_schema,
    length,
    lower_case,
    number,
    regex,
    schema_validator,
)
from deltaw.training.rewards.unit_tests import unit_tests

__all__ = ["BUILT_IN", "Reward", "Scored", "required_columns", "reward_of"]

BUILT_IN: Mapping[str, Callable[[RewardFunction, Sequence[Scored]], list[float | None]]] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "regex": regex,
    "lower-case": lower_case,
    "json-schema": json_schema,
    "length": length,
    "math": math_answer,
    "unit-tests": unit_tests,
    "judge": judge,
    "reasoning-gym": reasoning_gym,
}
_MODEL = "model"
# Parameters of a user's function that are no columns, and the columns that built-in rewards need.
_TEXT_PARAMETERS = ("prompt", "prompts", "completion", "completions")
_REQUIRED_COLUMNS = dict.fromkeys(("exact", "contains", "number", "math"), ("answer",))
_REQUIRED_COLUMNS |= {"unit-tests": ("tests",), "reasoning-gym": ("metadata",)}


def reward_of(settings: RewardFunction) -> Reward:
    """The function that the settings name.

    Raises:
        UserError: there is none, or its file cannot be run.
    """
    name = settings.name
    if ":" in name:
        return partial(_of_user, from_file(name, place_of(settings)))
    if name == _MODEL:  # found by name, as tasks are: it opens runs, which reward completions themselves
        reward: Reward = importlib.import_module("deltaw.training.rewards.reward_model").RewardModel(settings)
        return reward
    if name not in BUILT_IN:
        hint = f"{did_you_mean(name, [*BUILT_IN, _MODEL])} a function of your own is rewards.py:name"
        raise UserError(f"there is no reward '{name}'", where=place_of(settings), hint=hint)
    return partial(BUILT_IN[name], settings)


def required_columns(settings: RewardFunction, reward: Reward) -> list[str]:
    """Return the columns that a reward cannot do without; "answer" may also be the answer that a row has.

    Raises:
        UserError: if the reward cannot be used with any row.
    """
    if settings.name == "unit-tests" and settings.tests:
        return []
    if settings.key_from is not None:
        read_key(settings.key_from, place_of(settings))
    if settings.name == "json-schema":
        schema_validator(settings)
    if ":" in settings.name and isinstance(reward, partial):
        return _required_parameters(inspect.signature(reward.args[0]).parameters)
    return [settings.column] if settings.column is not None else list(_REQUIRED_COLUMNS.get(settings.name, ()))


def _required_parameters(takes: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the parameters without a default that columns must provide."""
    by_name = [one for one in takes.values() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return [one.name for one in by_name if one.default is one.empty and one.name not in _TEXT_PARAMETERS]


def _of_user(function: Callable[..., Any], given: Sequence[Scored]) -> list[float | None]:
    """Call a user's function with all rows or with one at a time, depending on the names of its parameters."""
    takes = inspect.signature(function).parameters
    rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    values = [{**({} if one.answer is None else {"answer": one.answer}), **one.columns} for one in given]
    named = {name for columns in values for name in columns if rest or name in takes}
    arguments = sorted(named.difference(_TEXT_PARAMETERS).union(_required_parameters(takes)))
    if "completion" in takes:
        found = []
        for one, row_columns in zip(given, values, strict=True):
            columns = {name: row_columns.get(name) for name in arguments}
            asked = {"prompt": one.prompt} if rest or "prompt" in takes else {}
            found.append(function(completion=one.text, **asked, **columns))
        return found
    lists = {name: [columns.get(name) for columns in values] for name in arguments}
    if rest or "prompts" in takes:
        lists["prompts"] = [one.prompt for one in given]
    return list(function(completions=[one.text for one in given], **lists))
