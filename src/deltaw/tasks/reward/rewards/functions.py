"""Built-in reward functions, and loading of functions from files."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, did_you_mean, first_line
from deltaw.tasks.reward.settings import RewardFunction, refuse_remote_references


@dataclass(frozen=True)
class Completion:
    """A completion to score.

    Attributes:
        prompt: Text of the last turn of the prompt.
        text: Text of the completion, without the end token.
        answer: Answer of the row, or None.
        row: Number of the row in its file.
        columns: Columns of the row.
        ended: True if the model ended the completion, False if it reached the token limit.
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


def require_file(reference: str, location: str) -> Path:
    """Return the file of ``FILE.py:NAME``.

    Raises:
        UserError: if the file does not exist.
    """
    file = reference.rpartition(":")[0]
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no file {file or reference}", location=location, hint="use FILE.py:NAME")
    return path


def load_function(reference: str, location: str) -> Callable[..., Any]:
    """Load the object ``FILE.py:NAME``.

    Raises:
        UserError: if the file or the name does not exist, or the file cannot be executed.
    """
    file, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("rewards_of_the_run", require_file(reference, location))
    assert spec is not None and spec.loader is not None, "the file's name ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code can raise any exception
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {error}", location=location) from error
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        candidates = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise UserError(f"{file} has no function '{name}'", location=location, hint=did_you_mean(name, candidates))
    return function


# Everything that looks like a number, with all digits, points and separators that touch each other, and a denominator.
# A sign after a letter or a digit is a hyphen. Exponents, denominators of LaTeX and superscripts are included, so that
# they are not read as numbers of their own.
_NUMBER_LIKE = re.compile(
    r"(?:\^\{?|\}\{)?(?:(?<!\w)[-+\u2212\u2013])?\.?\d[\d.,\u00a0\u202f]*(?:(?<=\d)[eE][-+\u2212]?\d+)?(?:/\d[\d.,/]*)?"
    r"[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u207e\u2150-\u215f]*"
)
# Digits in groups of three after the first group, or without separators.
_NUMBER = re.compile(
    r"(?P<sign>[-+\u2212\u2013]?)"
    r"(?P<digits>(?!0)\d{1,3}(?P<separator>[,\u00a0\u202f])\d{3}(?:(?P=separator)\d{3})*|\d*)"
    r"(?P<decimals>(?:\.\d+)?)(?:[eE](?P<exponent>[-+\u2212]?\d{1,3}))?(?:/(?P<denominator>\d+))?"
)


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


def length(settings: RewardFunction, completions: Sequence[Completion]) -> list[float | None]:
    """Return the number of words as a share of ``target``. Beyond the target, the reward decreases to 0."""
    target = settings.target or 1
    return [max(0.0, 1 - abs(len(completion.text.split()) - target) / target) for completion in completions]


def last_number(text: str | None) -> Fraction | None:
    """Return the exact value of the last number of a text, or None if there is none or it is ambiguous.

    Ambiguous are for example ``1,2,3``, ``1.5.2``, ``1.234,5``, ``2^3`` and ``5²``.
    """
    candidates = _NUMBER_LIKE.findall(text or "")
    match = _NUMBER.fullmatch(candidates[-1].rstrip(".,/\u00a0\u202f")) if candidates else None
    if match is None:
        return None
    digits = match["digits"].replace(match["separator"] or ",", "")
    sign, exponent = (re.sub("[\u2212\u2013]", "-", match[name] or "") for name in ("sign", "exponent"))
    try:
        return Fraction(f"{sign}{digits}{match['decimals']}e{exponent or 0}") / int(match["denominator"] or 1)
    except (ValueError, ZeroDivisionError):  # too many digits, or a denominator of 0
        return None


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
