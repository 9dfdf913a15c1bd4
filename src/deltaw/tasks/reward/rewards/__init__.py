"""Reward functions, which assign a number to each completion: built-in ones, and functions of the user.

A run lists them with weights (``reward.functions``). Each runs in a separate worker process with a time limit
(:class:`deltaw.tasks.reward.rewards.rewarder.Rewarder`), because it may hang, leak memory or crash. A reward is a
finite number, or None if the function does not apply to a row, which counts as 0.

A function of a file, for example ``rewards.py:length``, has one of two signatures. It receives ``prompts``,
``completions`` and the columns by name, all as lists like in TRL, and returns a list of numbers. Or it receives
``prompt``, ``completion`` and the columns of one row, and returns a number. ``answer`` is the answer of the row, unless
a column has this name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from deltaw.errors import UserError, did_you_mean, read_key
from deltaw.tasks.reward.rewards.function_files import load_function
from deltaw.tasks.reward.rewards.functions import (
    Completion,
    Reward,
    contains,
    exact,
    length,
    lower_case,
    math_answer,
    number,
    reasoning_gym,
    regex,
    settings_location,
)
from deltaw.tasks.reward.rewards.judge import judge
from deltaw.tasks.reward.rewards.schema_reward import json_schema, schema_validator
from deltaw.tasks.reward.rewards.unit_tests import unit_tests
from deltaw.tasks.reward.settings import RewardFunction

__all__ = ["BUILT_IN", "Completion", "Reward", "load_reward", "required_columns"]

BUILT_IN: Mapping[str, Callable[[RewardFunction, Sequence[Completion]], list[float | None]]] = {
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
# Parameters of user functions that are not columns, and the columns that built-in rewards need.
_TEXT_PARAMETERS = ("prompt", "prompts", "completion", "completions")
_REQUIRED_COLUMNS = dict.fromkeys(("exact", "contains", "number", "math"), ("answer",))
_REQUIRED_COLUMNS |= {"unit-tests": ("tests",), "reasoning-gym": ("metadata",)}


def load_reward(settings: RewardFunction) -> Reward:
    """Load the reward function of the settings.

    Raises:
        UserError: if the function does not exist, or its file cannot be executed.
    """
    name = settings.name
    if ":" in name:
        return partial(_call_user_function, load_function(name, settings_location(settings)))
    if name == _MODEL:
        from deltaw.tasks.reward.rewards.reward_model import RewardModel

        return RewardModel(settings)
    if name not in BUILT_IN:
        hint = f"{did_you_mean(name, [*BUILT_IN, _MODEL])} for your own function, use rewards.py:name"
        raise UserError(f"there is no reward '{name}'", location=settings_location(settings), hint=hint)
    return partial(BUILT_IN[name], settings)


def required_columns(settings: RewardFunction, reward: Reward) -> list[str]:
    """Return the columns that a reward requires. "answer" may also be the answer of a row.

    Raises:
        UserError: if the reward cannot be used with any row.
    """
    if settings.name == "unit-tests" and settings.tests:
        return []
    if settings.key_from is not None:
        read_key(settings.key_from, settings_location(settings))
    if settings.name == "json-schema":
        schema_validator(settings)
    if ":" in settings.name and isinstance(reward, partial):
        return _required_parameters(inspect.signature(reward.args[0]).parameters)
    return [settings.column] if settings.column is not None else list(_REQUIRED_COLUMNS.get(settings.name, ()))


def _required_parameters(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the parameters without a default that columns must provide."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in parameters.values() if p.kind in kinds and p.default is p.empty]
    return [name for name in required if name not in _TEXT_PARAMETERS]


def _call_user_function(function: Callable[..., Any], completions: Sequence[Completion]) -> list[float | None]:
    """Call a user's function with all rows or with one at a time, depending on the names of its parameters."""
    parameters = inspect.signature(function).parameters
    accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    values = [{**({} if c.answer is None else {"answer": c.answer}), **c.columns} for c in completions]
    provided = {name for columns in values for name in columns if accepts_any or name in parameters}
    arguments = sorted(provided.difference(_TEXT_PARAMETERS).union(_required_parameters(parameters)))
    if "completion" in parameters:
        rewards = []
        for completion, row_columns in zip(completions, values, strict=True):
            columns = {name: row_columns.get(name) for name in arguments}
            prompt = {"prompt": completion.prompt} if accepts_any or "prompt" in parameters else {}
            rewards.append(function(completion=completion.text, **prompt, **columns))
        return rewards
    lists = {name: [columns.get(name) for columns in values] for name in arguments}
    if accepts_any or "prompts" in parameters:
        lists["prompts"] = [completion.prompt for completion in completions]
    return list(function(completions=[completion.text for completion in completions], **lists))
