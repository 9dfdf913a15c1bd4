"""Completions that resemble a right answer, and are not rewarded by the built-in reward functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from deltaw.tasks.reward.rewards import load_reward
from deltaw.tasks.reward.rewards.functions import Completion
from deltaw.tasks.reward.rewards.rewarder import Rewarder
from deltaw.tasks.reward.settings import RewardFunction
from tests.conftest import refusal


def reward_of(name: str, text: str, answer: str | None = None, **options: object) -> float | None:
    settings = RewardFunction.model_validate({"name": name, **options})
    return load_reward(settings)([Completion("asked", text, answer, 1, {})])[0]


number: Callable[..., float | None] = partial(reward_of, "number")
contains: Callable[..., float | None] = partial(reward_of, "contains")
json_schema: Callable[..., float | None] = partial(reward_of, "json-schema")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1,2,3", "123"),
        ("1.5.2", "0.2"),
        ("1.5.2", "2"),
        ("0,123", "123"),
        ("12,34", "1234"),
        ("1,234,5", "12345"),
        ("1.234,5", "5"),
        ("1,,234", "1234"),
        ("1,234\u00a0567", "1234567"),
        ("2024-01-02", "-2"),
        ("between 3-5", "-5"),
        ("\u22125", "5"),
        ("1/2", "2"),
        ("1/2/2024", "2024"),
        ("5/0", "5"),
        ("192.168.0.1", "1"),
        ("9007199254740992", "9007199254740993"),
        ("0.1000000000000000000001", "0.1"),
        ("1e400", "1e399"),
        ("1e999999999", "1"),
        ("5 or 6", "5"),
        ("2^3", "3"),
        ("10^{-3}", "-3"),
        ("5\u00b2", "5"),
        ("5\u00bd", "5"),
        ("\\frac{1}{2}", "2"),
        ("\u201342", "42"),
        ("", "0"),
        ("five", "5"),
        ("9" * 5000, "1"),
    ],
)
def test_other_number_is_not_rewarded(text, answer):
    assert number(text, answer, tolerance=0) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 1,234.", "1234"),
        ("1,234,567.50", "1234567.5"),
        ("1\u202f234", "1,234"),
        ("$1,000,000", "1000000"),
        ("so x = -5.", "-5"),
        ("\u22125", "-5"),
        ("-.5", "-0.5"),
        ("+7", "7"),
        ("1.2e3", "1200"),
        ("5E-1", "0.5"),
        ("3/4", "0.75"),
        ("1, 2, 3", "3"),
        ("it is 12%", "12"),
        ("9 km", "9"),
        ("9007199254740993", "9,007,199,254,740,993"),
        ("\u0661\u0662", "12"),
        ("0.1", "0.10"),
        ("007", "7"),
        ("Result: 5...", "5"),
        ("\u201342", "-42"),
        ("pages 3\u20135", "5"),
        ("x^2 = 9", "9"),
        ("**42**", "42"),
        ("42 m\u00b2", "42"),
    ],
)
def test_same_number_is_rewarded(text, answer):
    assert number(text, answer, tolerance=0) == 1


def test_tolerance_of_numbers():
    assert number("0.1000001", "0.1") == 1
    assert number("0.10001", "0.1") == 0
    assert number("7", "no number") is None


@pytest.mark.parametrize("name", ["contains", "exact", "number", "math"])
@pytest.mark.parametrize("answer", [None, "", " \n", "\u00a0"])
def test_blank_answer_rewards_nothing(name, answer):
    if name == "math":
        pytest.importorskip("math_verify")
    assert [reward_of(name, text, answer) for text in ("", "anything", " ")] == [None] * 3


def test_rows_with_blank_answers_only_are_rejected():
    rewarder = Rewarder(RewardFunction(name="contains"))
    rows = [Completion("asked", "text", " ", number, {"answer": " "}) for number in (1, 2)]
    error = refusal(rewarder.check, iter(rows), call=False)
    rewarder.close()
    assert "the reward needs 'answer'" in error.message


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("15", "5"),
        ("0.5", "5"),
        (".5", "5"),
        ("5.5", "5"),
        ("5,000", "5"),
        ("1,5", "5"),
        ("-5", "5"),
        ("\u22125", "5"),
        ("1/5", "5"),
        ("5/2", "5"),
        ("\u20135", "5"),
        ("cats", "cat"),
        ("caf\u0065\u0301", "cafe"),
    ],
)
def test_part_of_word_or_number_does_not_contain_answer(text, answer):
    assert contains(text, answer) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 5.", "5"),
        ("3-5", "5"),
        ("5, 6", "5"),
        ("-5", "-5"),
        ("caf\u0065\u0301 au lait", "caf\u00e9"),
        ("a cat.", "cat"),
        ("C++!", "C++"),
        ("答案是北京。", "北京"),
        ("答えは東京です", "東京"),
        ("คำตอบคือกรุงเทพครับ", "กรุงเทพ"),
        ("一共5个", "5"),
        ("我用Python写", "Python"),
    ],
)
def test_word_contains_answer(text, answer):
    assert contains(text, answer) == 1


@pytest.mark.parametrize(
    ("text", "step", "expected"),
    [("0.3", 0.1, 1), ("19.99", 0.01, 1), ("19.995", 0.01, 0.5), ("1e3", 0.5, 1), ("9", 3, 1), ("10", 3, 0.5)],
)
def test_multiples_are_exact(text, step, expected):
    assert json_schema(text, schema={"type": "number", "multipleOf": step}) == expected


def test_invalid_pattern_is_rejected_with_the_settings():
    error = refusal(RewardFunction, name="regex", pattern="(")
    assert "not a regular expression" in error.message


NUMBER = {"type": "number", "minimum": 3}


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[NaN]", '{"a": -Infinity}', "[1E400]"])
def test_number_that_is_not_json_is_not_rewarded(text):
    assert json_schema(text, schema={}) == 0
    assert json_schema(text, schema=NUMBER) == 0


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "x", "a": 1}',
        '{"b": [{"c": 1, "c": 1}]}',
        '{"a": 1} trailing',
        '\ufeff{"a": 1}',
        '```json\n{"a": 1}\n```',
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": 1 /* comment */}',
        '{"a": "\n"}',
        '{"a": 01}',
        '{"a": .5}',
        '{"a": \u0661}',
        "[" * 100_000,
        "",
        " ",
        "9" * 5000,
    ],
)
def test_text_that_is_not_json_is_not_rewarded(text):
    assert json_schema(text, schema={}) == 0


@pytest.mark.parametrize(
    ("text", "schema", "reward"),
    [
        ('{"a": 1}', {"required": ["a"]}, 1.0),
        ('{"b": 1}', {"required": ["a"]}, 0.5),
        (" [1, 2]\n", {"type": "array"}, 1.0),
        ("true", {"const": 1}, 0.5),
        ("[1, true]", {"uniqueItems": True}, 1.0),
        ("9007199254740993", {"const": 9007199254740992}, 0.5),
        ('"2026-02-30"', {"type": "string", "format": "date"}, 0.5),
        ('"2026-02-28"', {"type": "string", "format": "date"}, 1.0),
        ('"anything"', {"type": "string", "format": "ipv4"}, 0.5),
        ("[" * 900 + "]" * 900, {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}}, 0.5),
    ],
)
def test_json_is_rewarded_by_schema(text, schema, reward):
    assert json_schema(text, schema=schema) == reward


def test_exact_answer_is_compared_by_characters():
    assert reward_of("exact", " cafe\u0301\n", "caf\u00e9") == 1
    assert [reward_of("exact", text, "yes") for text in ("Yes", "yes.", "yes no", "\u200byes", "")] == [0] * 5
