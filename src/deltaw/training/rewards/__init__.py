"""Rewards: functions of completions, each a number; built in, or in a file of the user's own.

A run names them with weights (``reward.functions``). Each runs in a worker process of its own with a limit on its
time, since it may hang, leak or die: :class:`deltaw.training.rewards.rewarder.Rewarder` asks. A reward is a finite
number, or None where a function has nothing to say of a row, which then counts 0.

A file's function, as in ``rewards.py:length``, takes ``prompts``, ``completions`` and the rows' columns by their names,
each a list, as TRL's do, and gives a list of numbers; or ``prompt``, ``completion`` and columns of one row, and gives
a number.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Reward, Scored, from_file, place_of
from deltaw.training.rewards.judge import judge
from deltaw.training.rewards.libraries import math_answer, reasoning_gym
from deltaw.training.rewards.texts import contains, exact, json_schema, length, lower_case, number, regex
from deltaw.training.rewards.unit_tests import unit_tests

__all__ = ["BUILT_IN", "Reward", "Scored", "reward_of"]

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
    lists = {name: [one.columns.get(name) for one in given] for name in wanted}
    if rest or "prompts" in takes:
        lists["prompts"] = [one.prompt for one in given]
    return list(function(completions=[one.text for one in given], **lists))
