"""Every shape of row, and every way in which a row can fail to keep to its shape."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from deltaw.data.formats import FORMS, Conversation, Pair, Record, Text, choose_form, read_records, unused_columns
from deltaw.data.messages import conversation, read_messages, read_prompt, read_tools, without_blank_answers
from deltaw.data.report import BadRowError
from deltaw.data.sources import Rows
from tests.data.conftest import assistant, refusal, user

Row = dict[str, object]


def rows_of(*rows: Row) -> Rows:
    return Rows("d.jsonl", [("d.jsonl", range(1, len(rows) + 1), rows)])


def read(*rows: Row, form: str = "auto", columns: Mapping[str, str] | None = None) -> list[Record]:
    table = rows_of(*rows)
    chosen = choose_form(table, form, columns or {})
    return read_records(table, range(len(table)), chosen, columns or {})


def system(content: object) -> Row:
    return {"role": "system", "content": content}


def contents(record: Record) -> list[tuple[object, object, bool]]:
    assert isinstance(record, Conversation)
    return [(m["role"], m["content"], may) for m, may in zip(record.messages, record.learned, strict=True)]


GOOD = [user("a"), assistant("b")]
FEW = [user("x"), assistant("y"), user("a")]
# Roles by their first letters, in capitals where the turn is learned, and what they say.
READ: list[tuple[Row, str]] = [
    ({"messages": [system("s"), *GOOD, user("c"), assistant("d")], "id": 3}, "s:s u:a A:b u:c A:d"),
    ({"messages": [*GOOD, system("s"), user("c"), assistant("d")]}, "u:a A:b s:s u:c A:d"),
    ({"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]}, "u:a a:b u:c A:d"),
    ({"messages": [user("a"), assistant("b", weight=0.0), user("c"), assistant("d")]}, "u:a a:b u:c A:d"),
    ({"messages": [user([{"type": "text", "text": t} for t in ("Who", "are")]), assistant("b")]}, "u:Who\nare A:b"),
    ({"messages": [user([]), assistant("b")]}, "u: A:b"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}, "s:s u:a A:b"),
    ({"prompt": FEW, "completion": [assistant("b")]}, "u:x a:y u:a A:b"),
    ({"prompt": FEW, "completion": "b"}, "u:x a:y u:a A:b"),
    ({"prompt": "a", "completion": [assistant("b")]}, "u:a A:b"),
    ({"instruction": "do", "input": "it", "output": "done"}, "u:do\n\nit A:done"),
    ({"instruction": "do", "input": "", "output": "no"}, "u:do A:no"),
    ({"input": [system("s")], "ideal": "b"}, "s:s A:b"),
    ({"input": FEW, "ideal": "b"}, "u:x a:y u:a A:b"),
]


@pytest.mark.parametrize(("row", "expected"), READ)
def test_every_form_of_conversation_is_read(row: Row, expected: str) -> None:
    (record,) = read(row)
    letters = (f"{role[0].upper() if may else role[0]}:{said}" for role, said, may in contents(record))
    assert " ".join(letters) == expected


def test_prompts_and_completions_texts_and_other_names_of_columns() -> None:
    row: Row = {"prompt": "a", "completion": "b", "text": "c"}
    assert read(row) == read({"input": "a", "ideal": ["b", "c"]}) == [Pair("a", "b")]
    assert read(row, form="text") == [Text("c")]
    assert "needs the column 'messages'" in refusal(read, row, form="messages").what
    row, columns = {"question": "a", "answer": "b", "text": "c"}, {"prompt": "question", "completion": "answer"}
    assert read(row, columns=columns) == [Pair("a", "b")]
    table = rows_of(row)
    assert unused_columns(table, choose_form(table, "auto", columns), columns) == ("text",)
    # A missing cell is named as the file names it.
    error = refusal(read, row, {"question": "a", "answer": None}, columns=columns)
    assert error.what.startswith("'answer'")
    error = refusal(read, row, columns={"prompt": "qestion", "completion": "answer"})
    assert "no column 'qestion'" in error.what and "'question'" in str(error.hint)


def test_turns_after_the_last_answer_are_left_out_and_null_keys_dropped_from_a_copy_of_the_row() -> None:
    row: Row = {"messages": [user("a"), assistant("b", weight=1, name=None), user("thanks")]}
    given = copy.deepcopy(row)
    (record,) = read(row)
    assert isinstance(record, Conversation) and record.messages == (user("a"), assistant("b"))
    assert record.trailing == 1 and row == given


def test_columns_that_fit_no_form_are_listed_with_the_forms_and_the_nearest() -> None:
    error = refusal(read, {"promt": "a", "completions": "b"})
    assert "'promt', 'completions'" in str(error.where)
    assert "'promt': did you mean 'prompt'" in str(error.hint)
    assert all(form in str(error.hint) for form in ("messages", "sharegpt", "alpaca", "evals", "text"))


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
    *(
        ([user([{"type": "text", "text": "a"}, part]), assistant("b")], ", turn 1", "text")
        for part in ({"type": "image_url", "image_url": {"url": "a.png"}}, {"text": "a"}, "a", {"type": "text"}, None)
    ),
    *(([user("a"), assistant("b", weight=weight)], ", turn 2", "weight") for weight in (0.5, 2, -1, "1", True, [1])),
    *(
        ([user("a"), assistant("", tool_calls=calls)], ", turn 2", "call")
        for calls in ("f()", [3], [{"function": {}}], [{"function": "f"}], [{"name": 3}])
    ),
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
    *(
        ({"messages": GOOD, "tools": tools}, "", "'tools' must be")
        for tools in ("{", "{}", 3, ["clock"], {"name": "c"})
    ),
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
    fine = FINE[next(iter(row))]
    error = refusal(read, {**fine, "tools": []} if "tools" in row else fine, row)
    assert isinstance(error, BadRowError) and said in error.what and error.where == f"d.jsonl, row 2{turn}"
    assert error.reason == "a weight other than 0 and 1" or said != "weight"


@pytest.mark.parametrize("prompt", [[], GOOD, [assistant("x")], "a", [user(3)]])
def test_a_prompt_must_wait_for_an_answer(prompt: object) -> None:
    refusal(read_prompt, prompt, "the prompt")


def test_tools_are_a_list_or_json_text_of_one() -> None:
    tool = {"type": "function", "function": {"name": "clock"}}
    for given in ([tool], json.dumps([tool])):
        assert read_tools(given, "row 1") == (tool,)
    assert read_tools(None, "row 1") == read_tools("", "row 1") == ()


def test_arguments_of_calls_given_as_json_text_become_objects() -> None:
    """As in the format of OpenAI; templates write them as JSON, so that text would be quoted twice."""
    given, expected = (
        [{"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]
        for arguments in ('{"x": 1}', {"x": 1})
    )
    (message,) = read_messages([assistant(None, tool_calls=given)], "messages", "r")
    assert (message["tool_calls"], message["content"]) == (expected, "")
    assert given[0]["function"]["arguments"] == '{"x": 1}'


def test_an_answer_of_reasoning_alone_is_not_blank() -> None:
    for answer, learned in ((assistant("", reasoning_content="hm"), True), (assistant(" "), False)):
        found = conversation([], [user("a"), answer], "row 1")
        assert without_blank_answers(found).learned == (False, learned)


def test_the_examples_of_the_documentation_are_read_as_they_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\*\*([a-z-]+)\*\*[^\n]*\n```json\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert [form for form, _ in examples] == [form.name for form in FORMS]
    for form, row in examples:
        table = rows_of(json.loads(row))
        assert choose_form(table).name == form
        read_records(table, [0], choose_form(table), {})
