"""Reward functions: what the built-in ones give, and what happens where a user's own goes wrong."""

from __future__ import annotations

import os

import pytest

from deltaw.errors import UserError
from deltaw.task_settings import RewardFunction
from deltaw.training.rewards import Scored
from deltaw.training.rewards.rewarder import Rewarder

OWN = """
import os, sys, time
def words(completions, per_word, **columns):
    print("this goes to nobody's answer")
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


def scored(text: str, answer: str | None = None, row: int = 1, **columns: object) -> Scored:
    return Scored("asked", text, answer, row, columns)


GIVEN = [scored("one", row=4, per_word=2), scored("two words", row=7, per_word=3)]


@pytest.fixture
def rewarder(tmp_path):
    made = []

    def make(name: str, **settings: object) -> Rewarder:
        if name in OWN:
            (tmp_path / "own.py").write_text(OWN)
            name = f"{tmp_path / 'own.py'}:{name}"
        made.append(Rewarder(RewardFunction.model_validate({"name": name, "seconds": 20, **settings})))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({"name": "exact"}, [scored(" red\n", "red"), scored("Red", "red"), scored("red")], [1, 0, 0]),
        ({"name": "exact", "column": "gold"}, [scored("7", "8", gold=7), scored("8", "8", gold=7)], [1, 0]),
        ({"name": "contains"}, [scored("it is red.", "red"), scored("reddish", "red")], [1, 0]),
        ({"name": "number"}, [scored("2 + 2 = 1,004.0", "1004"), scored("4", "5"), scored("none", "5")], [1, 0, 0]),
        ({"name": "number", "tolerance": 1}, [scored("4", "5"), scored("3", "5")], [1, 0]),
        ({"name": "regex", "pattern": r"\d+"}, [scored("12"), scored("12 a")], [1, 0]),
        ({"name": "lower-case"}, [scored("abc, d"), scored("Abcd"), scored("12")], [1, 0.75, 0]),
        ({"name": "length", "target": 4}, [scored("a b c d"), scored("a b"), scored("a " * 9)], [1, 0.5, 0]),
        (
            {"name": "json-schema", "schema": {"type": "object", "required": ["a"]}},
            [scored('{"a": 1}'), scored('{"b": 1}'), scored("{"), scored("[" * 9999)],
            [1, 0.5, 0, 0],
        ),
    ],
)
def test_built_in_rewards(rewarder, settings, given, expected):
    if settings["name"] == "json-schema":
        pytest.importorskip("jsonschema", reason="the extra reward is not installed")
    assert rewarder(**settings)(given) == expected


def test_a_function_of_ones_own_gets_columns_in_batches_or_row_by_row(rewarder):
    assert rewarder("words")(GIVEN) == [2, 6]
    assert rewarder("one")(GIVEN) == [5, 0]
    assert rewarder("loud")(GIVEN) == [1, 1]


@pytest.mark.parametrize(
    ("name", "said", "row"),
    [
        ("raises", "raised ZeroDivisionError", 7),
        ("dies", "ended its process", 4),
        ("nan", "the reward is nan", 7),
        ("few", "gave 1 numbers for 2 rows", None),
        ("text", "the reward is \"'good'\"", 4),
        ("nothere", "no function 'nothere'", None),
        ("long", "an answer longer than 16 MiB", 7),
        ("wordy", "raised ValueError: xxx", 4),
        ("huge", "the reward is '1000", 4),
    ],
)
def test_what_goes_wrong_is_named_with_its_row(rewarder, tmp_path, name, said, row):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError) as refused:
        rewarder(f"{tmp_path / 'own.py'}:{name}")(GIVEN)
    assert said in refused.value.what and "own.py" in str(refused.value.where)
    assert row is None or f"row {row}" in str(refused.value.where)


def test_one_that_hangs_ends_within_its_limit_and_names_the_row(rewarder, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    slow = rewarder(f"{tmp_path / 'own.py'}:hangs", seconds=1)
    with pytest.raises(UserError, match="within 1 seconds") as refused:
        slow(GIVEN)
    assert "row 7" in str(refused.value.where)
    assert slow([GIVEN[0]]) == [1]  # a new worker answers


def test_answer_of_the_row_is_given_to_functions_that_ask_for_it(rewarder):
    given = [
        scored("a", "gold", per_word=1),
        scored("b", None),
        Scored("asked", "c", "gold", 1, {"answer": "its column"}),
    ]
    assert rewarder("answers")(given) == rewarder("each")(given) == [4, 0, 10]


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ({"name": "needs"}, [scored("x", wanted=1)], "needs 'other', which no row has"),
        ({"name": "answers"}, [scored("x", other=1)], "needs 'answer', which no row has"),
        ({"name": "neither"}, [scored("x", texts=1)], "unexpected keyword argument 'completions'"),
        ({"name": "raises"}, [scored("two words")], "raised ZeroDivisionError"),
        ({"name": "text"}, [scored("x")], "the reward is"),
        ({"name": "few"}, [scored("x")], None),
        ({"name": "exact"}, [scored("x")], "needs 'answer'"),
        ({"name": "number", "column": "gold"}, [scored("x", "7")], "needs 'gold'"),
        ({"name": "unit-tests"}, [scored("x", "7")], "needs 'tests'"),
        ({"name": "reasoning-gym"}, [scored("x", "7")], "needs 'metadata'"),
        ({"name": "needs"}, [scored("x", wanted=1), scored("x", wanted=1, other=2)], None),
        ({"name": "exact"}, [scored("x"), scored("x", "7")], None),
        ({"name": "judge", "url": "http://127.0.0.1:9", "model": "m", "key_from": "NO_KEY"}, [scored("x")], "not set"),
    ],
)
def test_check_refuses_functions_that_do_not_fit_the_rows(rewarder, settings, given, said):
    if said is None:
        rewarder(**settings).check(given, call=True)
        return
    with pytest.raises(UserError, match=said):
        rewarder(**settings).check(given, call=True)


def test_error_of_a_missing_column_lists_those_of_the_rows(rewarder):
    with pytest.raises(UserError) as refused:
        rewarder("needs").check([scored("x", "7", wanted=1), scored("x", color=2)], call=False)
    assert refused.value.hint == "the rows have: answer, color, wanted"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_one_that_forks_answers_once(rewarder):
    forking = rewarder("forks")
    assert [forking(GIVEN) for _ in range(3)] == [[1, 1]] * 3


def test_closing_ends_the_worker_and_what_it_started(rewarder):
    one = rewarder("lower-case")
    one(GIVEN)
    process = one._worker._process
    one.close()
    assert process is not None and process.poll() is not None


def test_unknown_rewards_and_missing_values_are_refused(rewarder):
    with pytest.raises(UserError, match="no reward 'exactly'") as refused:
        rewarder("exactly")(GIVEN)
    assert "did you mean 'exact'" in str(refused.value.hint)
    with pytest.raises(UserError, match="needs 'pattern'"):
        RewardFunction.model_validate({"name": "regex"})
