"""Rewards based on optional packages: math-verify and reasoning-gym."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Completion, expected_answer, missing_package_error, settings_location

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def math_answer(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    r"""Return 1 if the last mathematical expression of a completion equals the expected answer, like ``\\frac12`` and
    0.5.

    Raises:
        UserError: if the package is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise missing_package_error("math-verify", error, settings_location(settings)) from error
    rewards: list[float | None] = []
    for completion in completions:
        expected = expected_answer(settings, completion)
        # A bare answer such as \sqrt{2} has no math delimiters.
        gold = [] if expected is None else parse(f"${expected}$") or parse(expected)
        rewards.append(float(verify(gold, parse(completion.text))) if gold else None)
    return rewards


def reasoning_gym(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return the score of the package, from 0 to 1, for the text in ``<answer>`` tags or else the entire completion.

    The rows need the columns ``answer`` and ``metadata`` of ``reasoning-gym:NAME``.

    Raises:
        UserError: if the package or the data set is missing, or a row has no metadata.
    """
    return [_score(settings, completion) for completion in completions]


def _score(settings: RewardFunction, completion: Completion) -> float:
    metadata = completion.columns.get("metadata")
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    name = settings.dataset or (metadata.get("source_dataset") if isinstance(metadata, dict) else None)
    if not isinstance(metadata, dict) or name is None:
        hint = "train on reasoning-gym:NAME, or name the data set in 'dataset'"
        message = f"row {completion.row} has no metadata of reasoning-gym"
        raise UserError(message, location=settings_location(settings), hint=hint)
    tagged = _TAGGED.findall(completion.text)
    entry = {"question": completion.prompt, "answer": completion.answer, "metadata": metadata}
    answer = (tagged or [completion.text])[-1].strip()
    return float(_scorer(name, settings_location(settings)).score_answer(answer, entry))


@functools.cache
def _scorer(name: str, location: str) -> Any:
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise missing_package_error("reasoning-gym", error, location) from error
    if name not in DATASETS:
        raise UserError(f"there is no data set '{name}'", location=location, hint=did_you_mean(name, sorted(DATASETS)))
    return create_dataset(name)
