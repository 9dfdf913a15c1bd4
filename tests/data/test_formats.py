"""Every shape of row, and every way in which a row can fail to keep to its shape."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from deltaw.data.formats import FORMS, Conversation, Pair, Record, Text, choose_form, read_records, unused_columns
from deltaw.data.messages import read_prompt
from deltaw.data.sources import Rows
from deltaw.errors import UserError

Row = dict[str, object]


def rows_of(*rows: Row) -> Rows:
    return Rows("d.jsonl", [("d.jsonl", range(1, len(rows) + 1), rows)])


def read(*rows: Row, form: str = "auto", columns: Mapping[str, str] | None = None) -> list[Record]:
    table = rows_of(*rows)
    chosen = choose_form(table, form, columns or {})
    return read_records(table, range(len(table)), chosen, columns or {})


def refusal(*rows: Row, form: str = "auto", columns: Mapping[str, str] | None = None) -> UserError:
    with pytest.raises(UserError) as refused:
        read(*rows, form=form, columns=columns)
    return refused.value


def user(content: object) -> Row:
    return {"role": "user", "content": content}


def assistant(content: object, **more: object) -> Row:
    return {"role": "assistant", "content": content, **more}


def system(content: object) -> Row:
    return {"role": "system", "content": content}


def contents(record: Record) -> list[tuple[object, object, bool]]:
    assert isinstance(record, Conversation)
    return [(m["role"], m["content"], may) for m, may in zip(record.messages, record.learned, strict=True)]


def test_messages() -> None:
    (record,) = read({"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")], "id": 3})
    assert contents(record) == [
        ("system", "s", False),
        ("user", "a", False),
        ("assistant", "b", True),
        ("user", "c", False),
        ("assistant", "d", True),
    ]


@pytest.mark.parametrize("zero", [0, 0.0])
def test_messages_of_weight_zero_are_not_learned_and_null_keys_are_dropped(zero: float) -> None:
    (record,) = read({"messages": [user("a"), assistant("b", weight=zero, name=None), user("c"), assistant("d")]})
    assert isinstance(record, Conversation)
    assert record.learned == (False, False, False, True)
    assert record.messages[1] == {"role": "assistant", "content": "b"}


def test_turns_after_the_last_answer_are_left_out_and_counted() -> None:
    (record,) = read({"messages": [user("a"), assistant("b"), user("thanks")]})
    assert isinstance(record, Conversation)
    assert (len(record.messages), record.trailing) == (2, 1)


def test_sharegpt() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (record,) = read({"conversations": turns, "system": "s"})
    assert contents(record) == [("system", "s", False), ("user", "a", False), ("assistant", "b", True)]


def test_prompt_and_completion_as_strings_and_as_messages() -> None:
    assert read({"prompt": "a", "completion": "b"}) == [Pair("a", "b")]
    few_shot = [user("x"), assistant("y"), user("a")]
    (record,) = read({"prompt": few_shot, "completion": [assistant("b")]})
    assert [may for *_, may in contents(record)] == [False, False, False, True]
    assert read({"prompt": few_shot, "completion": "b"}) == [record]
    (mixed,) = read({"prompt": "a", "completion": [assistant("b")]})
    assert contents(mixed) == [("user", "a", False), ("assistant", "b", True)]


def test_other_names_of_columns() -> None:
    row: Row = {"question": "a", "answer": "b", "text": "c"}
    columns = {"prompt": "question", "completion": "answer"}
    assert read(row, columns=columns) == [Pair("a", "b")]
    table = rows_of(row)
    assert unused_columns(table, choose_form(table, "auto", columns), columns) == ("text",)


def test_alpaca_with_and_without_input() -> None:
    first, second = read(
        {"instruction": "do", "input": "it", "output": "done"}, {"instruction": "do", "input": "", "output": "no"}
    )
    assert contents(first) == [("user", "do\n\nit", False), ("assistant", "done", True)]
    assert contents(second) == [("user", "do", False), ("assistant", "no", True)]


def test_evals_rows() -> None:
    assert read({"input": "a", "ideal": ["b", "c"]}) == [Pair("a", "b")]
    (record,) = read({"input": [system("s")], "ideal": "b"})
    assert contents(record) == [("system", "s", False), ("assistant", "b", True)]
    (record,) = read({"input": [user("x"), assistant("y"), user("a")], "ideal": "b"})
    assert [may for *_, may in contents(record)] == [False, False, False, True]


def test_a_form_can_be_asked_for() -> None:
    row: Row = {"prompt": "a", "completion": "b", "text": "c"}
    assert read(row) == [Pair("a", "b")]
    assert read(row, form="text") == [Text("c")]
    error = refusal(row, form="messages")
    assert "needs the column 'messages'" in error.what


def test_columns_that_fit_no_form_are_listed_with_the_forms_and_the_nearest() -> None:
    error = refusal({"promt": "a", "completions": "b"})
    assert "'promt', 'completions'" in str(error.where)
    assert "'promt': did you mean 'prompt'" in str(error.hint)
    assert all(form in str(error.hint) for form in ("messages", "sharegpt", "alpaca", "evals", "text"))


def test_a_column_that_the_file_lacks_names_the_nearest() -> None:
    error = refusal({"question": "a", "answer": "b"}, columns={"prompt": "qestion", "completion": "answer"})
    assert "no column 'qestion'" in error.what
    assert "'question'" in str(error.hint)


def test_a_missing_cell_is_named_as_the_file_names_it() -> None:
    rows = ({"question": "a", "answer": "b"}, {"question": "a", "answer": None})
    error = refusal(*rows, columns={"prompt": "question", "completion": "answer"})
    assert error.what.startswith("'answer'")


GOOD = [user("a"), assistant("b")]
WRONG = [
    ({"prompt": "a"}, "", "'completion' is missing"),
    ({"prompt": None, "completion": "b"}, "", "'prompt' is empty (null)"),
    ({"prompt": "a", "completion": 1}, "", "'completion' must be text but is a int"),
    ({"prompt": "a", "completion": "\ud800"}, "", "surrogate"),
    ({"prompt": [user("a")], "completion": [user("b")]}, ", turn 2", "'user' cannot follow 'user'"),
    ([user("a"), user("b"), assistant("c")], ", turn 2", "'user' cannot follow 'user'"),
    ([assistant("b"), user("a")], ", turn 1", "cannot begin"),
    ([user("a"), system("s"), assistant("b")], ", turn 2", "'system' cannot follow 'user'"),
    ([*GOOD, assistant("c")], ", turn 3", "'assistant' cannot follow 'assistant'"),
    ([{"role": "tool", "content": "x"}, assistant("b")], ", turn 1", "cannot begin"),
    ([user("a"), {"role": "asistant", "content": "b"}], ", turn 2", "did you mean 'assistant'"),
    ([user("a"), {"content": "b"}], ", turn 2", "the role is None"),
    ([user("a"), assistant(None)], ", turn 2", "'content' must be text but is null"),
    ([user([{"type": "image_url"}]), assistant("b")], ", turn 1", "part 1 of 'content' is not text but image_url"),
    ([user("a"), "b"], ", turn 2", "must be an object but is a str"),
    ([user("a")], "", "no turn is the assistant's"),
    ([], "", "no turn is the assistant's"),
    ("a", "", "'messages' must be a list"),
    ({"conversations": "a"}, "", "'conversations' must be a list"),
    ({"conversations": [{"from": "huma", "value": "a"}]}, ", turn 1", "'huma' is not a known speaker"),
    ({"conversations": [{"role": "user"}]}, ", turn 1", "'from' and 'value'"),
    ({"input": "a", "ideal": []}, "", "empty list"),
    ({"input": 3, "ideal": "b"}, "", "'input' must be text"),
    ({"instruction": "a", "input": 3, "output": "b"}, "", "'input' must be text"),
]
FINE = {
    "messages": {"messages": GOOD},
    "prompt": {"prompt": "a", "completion": "b"},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "input": {"input": "a", "ideal": "b"},
    "instruction": {"instruction": "a", "output": "b"},
}


@pytest.mark.parametrize(("wrong", "turn", "said"), WRONG)
def test_a_later_row_that_is_wrong_is_named_with_its_turn(wrong: object, turn: str, said: str) -> None:
    """A row, or its messages."""
    row = wrong if isinstance(wrong, dict) else {"messages": wrong}
    error = refusal(FINE[next(iter(row))], row)
    assert said in error.what and error.where == f"d.jsonl, row 2{turn}"


@pytest.mark.parametrize("prompt", [[], GOOD, [assistant("x")], "a", [user(3)]])
def test_a_prompt_must_wait_for_an_answer(prompt: object) -> None:
    with pytest.raises(UserError):
        read_prompt(prompt, "the prompt")


def test_reading_does_not_change_the_rows() -> None:
    row: Row = {"messages": [user("a"), assistant("b", weight=1)]}
    read(row)
    assert row == {"messages": [user("a"), assistant("b", weight=1)]}


def test_the_examples_of_the_documentation_are_read_as_they_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\*\*([a-z-]+)\*\*[^\n]*\n```json\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert [form for form, _ in examples] == [form.name for form in FORMS]
    for form, row in examples:
        table = rows_of(json.loads(row))
        assert choose_form(table).name == form
        read_records(table, [0], choose_form(table), {})
