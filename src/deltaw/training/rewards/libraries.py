"""Rewards that optional packages compute: mathematics by math-verify, problems of reasoning-gym."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards.base import Scored, needs_extra, place_of, right_answer

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def math_answer(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """1 where the last mathematical expression of a completion equals the right answer's, as ``\\frac12`` and 0.5.

    Raises:
        UserError: the package is missing.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise needs_extra("math-verify", error, place_of(settings)) from error
    found: list[float | None] = []
    for one in given:
        right = right_answer(settings, one)
        # An answer alone, such as \sqrt{2}, is not marked as mathematics.
        gold = [] if right is None else parse(f"${right}$") or parse(right)
        found.append(float(verify(gold, parse(one.text))) if gold else None)
    return found


def reasoning_gym(settings: RewardFunction, given: Sequence[Scored]) -> list[float | None]:
    """What the package gives an answer, from 0 to 1: the text between ``<answer>`` tags, or all of it.

    The rows need ``answer`` and ``metadata``, as rows of ``reasoning-gym:NAME`` have them.

    Raises:
        UserError: the package or a data set is missing, or a row has no metadata.
    """
    return [_scored(settings, one) for one in given]


def _scored(settings: RewardFunction, one: Scored) -> float:
    metadata = one.columns.get("metadata")
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    name = settings.dataset or (metadata.get("source_dataset") if isinstance(metadata, dict) else None)
    if not isinstance(metadata, dict) or name is None:
        hint = "train on reasoning-gym:NAME, or name the data set in 'dataset'"
        raise UserError(f"row {one.row} has no metadata of reasoning-gym", where=place_of(settings), hint=hint)
    tagged = _TAGGED.findall(one.text)
    entry = {"question": one.prompt, "answer": one.answer, "metadata": metadata}
    return float(_scorer(name, place_of(settings)).score_answer((tagged or [one.text])[-1].strip(), entry))


@functools.cache
def _scorer(name: str, where: str) -> Any:
    try:
        from reasoning_gym import create_dataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise needs_extra("reasoning-gym", error, where) from error
    if name not in DATASETS:
        raise UserError(f"there is no data set '{name}'", where=where, hint=did_you_mean(name, sorted(DATASETS)))
    return create_dataset(name)
