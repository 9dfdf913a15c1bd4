"""Reward functions: results of the built-in ones and errors of user-defined ones."""

from __future__ import annotations

import os

import pytest

from deltaw.errors import UserError
from deltaw.tasks.reward.rewards.functions import Completion
from deltaw.tasks.reward.rewards.rewarder import Rewarder
from deltaw.tasks.reward.settings import RewardFunction
from tests.conftest import refusal

FUNCTIONS = """
import os, sys, time
def words(completions, per_word, **columns):
    print("this must not end up in a reward")
    return [len(text.split()) * each for text, each in zip(completions, per_word)]
def one(prompt, completion, per_word):
    return None if completion == "two words" else len(prompt)
def raises(completions, **columns):
    return [1 / (text != "two words") for text in completions]
def hangs(completions, **columns):
    if "two words" in completions:
        time.sleep(1000)
    return [1] * len(completions)
def dies(completions, **columns):
    os._exit(3)
def nan(completions, **columns):
    return [float("nan") if text == "two words" else 1 for text in completions]
def few(completions, **columns):
    return [1]
def text(completions, **columns):
    return ["good"] * len(completions)
def forks(completions, **columns):
    os.fork()
    return [1] * len(completions)
def long(completions, **columns):
    return [1.0] * (1 << 23) if "two words" in completions else [1] * len(completions)
def wordy(completions, **columns):
    raise ValueError("x" * (1 << 25))
def huge(completions, **columns):
    return [10**400 for text in completions]
def answers(completions, answer, **columns):
    return [0 if right is None else len(right) for right in answer]
def each(completion, answer=None):
    return 0 if answer is None else len(answer)
def needs(completions, wanted, *, other, optional=1, **columns):
    return [1] * len(completions)
def neither(texts):
    return [1] * len(texts)
def loud(completions, **columns):
    sys.stdout.write("[1, 2]\\n" * 1000)
    sys.stdout.flush()
    return [1] * len(completions)
"""


def completion_of(text: str, answer: str | None = None, row: int = 1, **columns: object) -> Completion:
    return Completion("asked", text, answer, row, columns)


SCHEMA = {"type": "object", "required": ["a"]}
COMPLETIONS = [completion_of("one", row=4, per_word=2), completion_of("two words", row=7, per_word=3)]


@pytest.fixture
def rewarder(tmp_path):
    rewarders = []

    def make(name: str, **settings: object) -> Rewarder:
        if name in FUNCTIONS:
            (tmp_path / "own.py").write_text(FUNCTIONS)
            name = f"{tmp_path / 'own.py'}:{name}"
        rewarders.append(Rewarder(RewardFunction.model_validate({"name": name, "seconds": 20, **settings})))
        return rewarders[-1]

    yield make
    for rewarder in rewarders:
        rewarder.close()


@pytest.mark.parametrize(
    ("settings", "completions", "expected"),
    [
        ({"name": "exact"}, [(" red\n", "red"), ("Red", "red"), ("red",)], [1, 0, 0]),
        ({"name": "exact", "column": "gold"}, [("7", "8"), ("8", "8")], [1, 0]),
        ({"name": "contains"}, [("it is red.", "red"), ("reddish", "red")], [1, 0]),
        ({"name": "number"}, [("2 + 2 = 1,004.0", "1004"), ("4", "5"), ("none", "5")], [1, 0, 0]),
        ({"name": "number", "tolerance": 1}, [("4", "5"), ("3", "5")], [1, 0]),
        ({"name": "regex", "pattern": r"\d+"}, [("12",), ("12 a",)], [1, 0]),
        ({"name": "lower-case"}, [("abc, d",), ("Abcd",), ("12",)], [1, 0.75, 0]),
        ({"name": "length", "target": 4}, [("a b c d",), ("a b",), ("a " * 9,)], [1, 0.5, 0]),
        (
            {"name": "json-schema", "schema": SCHEMA},
            [('{"a": 1}',), ('{"b": 1}',), ("{",), ("[" * 9999,)],
            [1, 0.5, 0, 0],
        ),
    ],
)
def test_built_in_rewards(rewarder, settings, completions, expected):
    if settings["name"] == "json-schema":
        pytest.importorskip("jsonschema", reason="the extra reward is not installed")
    assert rewarder(**settings)([completion_of(*texts, gold=7) for texts in completions]) == expected


def test_user_function_receives_columns_in_batches_or_per_row(rewarder):
    assert rewarder("words")(COMPLETIONS) == [2, 6] and rewarder("one")(COMPLETIONS) == [5, 0]
    assert rewarder("loud")(COMPLETIONS) == [1, 1]


FAULTS = [("raises", "raised ZeroDivisionError", 7), ("dies", "its process exited", 4), ("nan", "the reward is nan", 7)]
FAULTS += [("few", "returned 1 numbers for 2 rows", None), ("text", "the reward is \"'good'\"", 4)]
FAULTS += [("nothere", "no function 'nothere'", None), ("long", "an answer longer than 16 MiB", 7)]
FAULTS += [("wordy", "raised ValueError: xxx", 4), ("huge", "the reward is '1000", 4)]


@pytest.mark.parametrize(("name", "message", "row"), FAULTS)
def test_error_is_reported_with_row(rewarder, tmp_path, name, message, row):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    error = refusal(rewarder(f"{tmp_path / 'own.py'}:{name}"), COMPLETIONS)
    assert message in error.message and "own.py" in str(error.location)
    assert row is None or f"row {row}" in str(error.location)


def test_hanging_function_is_stopped_and_reported_with_row(rewarder, tmp_path):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    slow = rewarder(f"{tmp_path / 'own.py'}:hangs", seconds=1)
    error = refusal(slow, COMPLETIONS, match="within 1 seconds")
    assert "row 7" in str(error.location)
    assert slow([COMPLETIONS[0]]) == [1]  # a new worker is started


def test_functions_receive_answer_of_row_if_requested(rewarder):
    completions = [completion_of("a", "gold", per_word=1), completion_of("b", None)]
    completions.append(Completion("asked", "c", "gold", 1, {"answer": "its column"}))
    assert rewarder("answers")(completions) == rewarder("each")(completions) == [4, 0, 10]


@pytest.mark.parametrize(
    ("settings", "completions", "message"),
    [
        ({"name": "needs"}, [completion_of("x", wanted=1)], "needs 'other', which no row has"),
        ({"name": "answers"}, [completion_of("x", other=1)], "needs 'answer', which no row has"),
        ({"name": "neither"}, [completion_of("x", texts=1)], "unexpected keyword argument 'completions'"),
        ({"name": "raises"}, [completion_of("two words")], "raised ZeroDivisionError"),
        ({"name": "text"}, [completion_of("x")], "the reward is"),
        ({"name": "few"}, [completion_of("x")], None),
        ({"name": "exact"}, [completion_of("x")], "needs 'answer'"),
        ({"name": "number", "column": "gold"}, [completion_of("x", "7")], "needs 'gold'"),
        ({"name": "unit-tests"}, [completion_of("x", "7")], "needs 'tests'"),
        ({"name": "reasoning-gym"}, [completion_of("x", "7")], "needs 'metadata'"),
        ({"name": "needs"}, [completion_of("x", wanted=1), completion_of("x", wanted=1, other=2)], None),
        ({"name": "exact"}, [completion_of("x"), completion_of("x", "7")], None),
        ({"name": "judge", "url": "http://a", "model": "m", "key_from": "NO_KEY"}, [completion_of("x")], "not set"),
    ],
)
def test_check_rejects_functions_unsuitable_for_rows(rewarder, settings, completions, message):
    if message is None:
        rewarder(**settings).check(completions, call=True)
        return
    refusal(rewarder(**settings).check, completions, call=True, match=message)


def test_missing_column_error_lists_available_columns(rewarder):
    with pytest.raises(UserError) as error:
        rewarder("needs").check([completion_of("x", "7", wanted=1), completion_of("x", color=2)], call=False)
    assert error.value.hint == "the rows have: answer, color, wanted"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forking_function_returns_one_result(rewarder):
    forking = rewarder("forks")
    assert [forking(COMPLETIONS) for _ in range(3)] == [[1, 1]] * 3


def test_close_stops_worker(rewarder):
    lower_case = rewarder("lower-case")
    lower_case(COMPLETIONS)
    process = lower_case._worker.process._process
    lower_case.close()
    assert process is not None and process.poll() is not None


def test_unknown_rewards_and_missing_settings_are_rejected(rewarder):
    error = refusal(rewarder("exactly"), COMPLETIONS, match="no reward 'exactly'")
    assert "did you mean 'exact'" in str(error.hint)
    refusal(RewardFunction.model_validate, {"name": "regex"}, match="needs 'pattern'")
