"""Built-in reward functions of the text of a completion."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.tasks.reward.rewards.last_number import last_number
from deltaw.tasks.reward.settings import RewardFunction


@dataclass(frozen=True)
class Completion:
    """A completion to score.

    Attributes:
        prompt: Text of the last turn of the prompt.
        text: Text of the completion, without the end token.
        answer: Answer of the row, or None.
        row: Number of the row in its file.
        columns: Columns of the row.
        ended: True if the model finished the completion, False if it reached the token limit.
    """

    prompt: str
    text: str
    answer: str | None
    row: int
    columns: Mapping[str, Any]
    ended: bool = True


Reward = Callable[[Sequence[Completion]], Sequence["float | None"]]


def expected_answer(settings: RewardFunction, completion: Completion) -> str | None:
    """Return the value of the configured column, or the answer of the row. None if it is missing or blank."""
    value = completion.answer if settings.column is None else completion.columns.get(settings.column)
    text = "" if value is None else unicodedata.normalize("NFC", str(value)).strip()
    return text or None


def settings_location(settings: RewardFunction) -> str:
    """Return the location of a reward in the settings, for messages."""
    return f"reward.functions, {settings.name}"


def missing_package_error(package: str, error: ImportError, location: str) -> UserError:
    """Return the error for a missing optional package."""
    message = f"the package '{package}' cannot be imported: {error}"
    return UserError(message, location=location, hint="pip install 'deltaw[reward]'")


def exact(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if a completion equals the expected answer, ignoring surrounding white space."""
    answers = [expected_answer(settings, completion) for completion in completions]
    pairs = zip(completions, answers, strict=True)
    return [None if answer is None else float(_text(c) == answer) for c, answer in pairs]


def _text(completion: Completion) -> str:
    """Return the text without surrounding white space, with characters composed as in the expected answer."""
    return unicodedata.normalize("NFC", completion.text).strip()


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, and Chinese and Japanese characters.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
# Character of a word in another script.
_WORD = rf"[^\W{_UNSPACED.pattern[1:-1]}]"


def contains(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return 1 if a completion contains the expected answer as a word, not as a part of a number.

    In scripts without spaces between words, it may also be a part of a word.
    """
    rewards: list[float | None] = []
    for completion in completions:
        if (answer := expected_answer(settings, completion)) is None:
            rewards.append(None)
            continue
        before = "" if _UNSPACED.match(answer[0]) else rf"(?<!{_WORD})"
        after = "" if _UNSPACED.match(answer[-1]) else rf"(?!{_WORD})"
        if answer[0].isdigit():
            before += r"(?<!\d[.,/])(?<!(?<!\w)[-\u2212\u2013.])"
        if answer[-1].isdigit():
            after += r"(?![.,/]\d)"
        pattern = before + re.escape(answer) + after
        rewards.append(float(re.search(pattern, _text(completion)) is not None))
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
        expected = last_number(expected_answer(settings, completion))
        actual = last_number(completion.text)
        if expected is None:
            rewards.append(None)
        else:
            rewards.append(float(actual is not None and abs(actual - expected) <= Fraction(settings.tolerance)))
    return rewards


def length(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return the number of words as a share of ``target``. Beyond the target, the reward decreases to 0."""
    target = settings.target or 1
    return [max(0.0, 1 - abs(len(completion.text.split()) - target) / target) for completion in completions]


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
