"""Row formats, and all ways in which a row can violate its format."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from deltaw.data.bad_rows import BadRowError
from deltaw.data.formats import FORMS, Pair, Record, Text, choose_form, read_records, unused_columns
from deltaw.data.messages import (
    Conversation,
    conversation,
    read_messages,
    read_prompt,
    read_tools,
    unlabel_blank_answers,
)
from deltaw.data.rows import NumberedRows
from tests.data.conftest import assistant, refusal, user

Row = dict[str, object]


def rows_of(*rows: Row) -> NumberedRows:
    return NumberedRows("d.jsonl", [("d.jsonl", range(1, len(rows) + 1), rows)])


def read(*rows: Row, form: str = "auto", columns: Mapping[str, str] | None = None) -> list[Record]:
    table = rows_of(*rows)
    row_format = choose_form(table, form, columns or {})
    return read_records(table, range(len(table)), row_format, columns or {})


def system(content: object) -> Row:
    return {"role": "system", "content": content}


def contents(record: Record) -> list[tuple[object, object, bool]]:
    assert isinstance(record, Conversation)
    return [(m["role"], m["content"], trained) for m, trained in zip(record.messages, record.learned, strict=True)]


EXCHANGE = [user("a"), assistant("b")]
FEW_SHOT = [user("x"), assistant("y"), user("a")]
# First letters of the roles (uppercase if the turn is trained) with the contents.
RENDERED: list[tuple[Row, str]] = [
    ({"messages": [system("s"), *EXCHANGE, user("c"), assistant("d")], "id": 3}, "s:s u:a A:b u:c A:d"),
    ({"messages": [*EXCHANGE, system("s"), user("c"), assistant("d")]}, "u:a A:b s:s u:c A:d"),
    ({"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]}, "u:a a:b u:c A:d"),
    ({"messages": [user([{"type": "text", "text": t} for t in ("Who", "are")]), assistant("b")]}, "u:Who\nare A:b"),
    ({"messages": [user([]), assistant("b")]}, "u: A:b"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}, "s:s u:a A:b"),
    ({"prompt": FEW_SHOT, "completion": [assistant("b")]}, "u:x a:y u:a A:b"),
    ({"prompt": FEW_SHOT, "completion": "b"}, "u:x a:y u:a A:b"),
    ({"instruction": "do", "input": "it", "output": "done"}, "u:do\n\nit A:done"),
    ({"input": [system("s")], "ideal": "b"}, "s:s A:b"),
    ({"input": FEW_SHOT, "ideal": "b"}, "u:x a:y u:a A:b"),
]


@pytest.mark.parametrize(("row", "expected"), RENDERED)
def test_every_conversation_format_is_read(row: Row, expected: str) -> None:
    (record,) = read(row)
    letters = (f"{role[0].upper() if is_trained else role[0]}:{text}" for role, text, is_trained in contents(record))
    assert " ".join(letters) == expected


def test_prompts_texts_and_column_mappings_are_read() -> None:
    row: Row = {"prompt": "a", "completion": "b", "text": "c"}
    assert read(row) == read({"input": "a", "ideal": ["b", "c"]}) == [Pair("a", "b")]
    assert read(row, form="text") == [Text("c")]
    assert "needs the column 'messages'" in refusal(read, row, form="messages").message
    row = {"question": "a", "answer": "b", "text": "c"}
    columns = {"prompt": "question", "completion": "answer"}
    assert read(row, columns=columns) == [Pair("a", "b")]
    table = rows_of(row)
    assert unused_columns(table, choose_form(table, "auto", columns), columns) == ("text",)
    # A missing cell is reported with the column name of the file.
    error = refusal(read, row, {"question": "a", "answer": None}, columns=columns)
    assert error.message.startswith("'answer'")
    error = refusal(read, row, columns={"prompt": "qestion", "completion": "answer"})
    assert "no column 'qestion'" in error.message and "'question'" in str(error.hint)


def test_trailing_turns_and_null_keys_are_dropped_without_changing_the_row() -> None:
    row: Row = {"messages": [user("a"), assistant("b", weight=1, name=None), user("thanks")]}
    original = copy.deepcopy(row)
    (record,) = read(row)
    assert isinstance(record, Conversation) and record.messages == (user("a"), assistant("b"))
    assert record.trailing == 1 and row == original


def test_unknown_columns_are_listed_with_formats_and_suggestions() -> None:
    error = refusal(read, {"promt": "a", "completions": "b"})
    assert "'promt', 'completions'" in str(error.location) and "'promt': did you mean 'prompt'" in str(error.hint)
    assert all(form in str(error.hint) for form in ("messages", "sharegpt", "alpaca", "evals", "text"))


TEXT = {"type": "text", "text": "a"}
INVALID = [
    ({"prompt": "a"}, "", "'completion' is missing"),
    ({"prompt": None, "completion": "b"}, "", "'prompt' is empty (null)"),
    ({"prompt": "a", "completion": 1}, "", "'completion' must be text but is a int"),
    ({"prompt": "a", "completion": "\ud800"}, "", "surrogate"),
    ({"prompt": [user("a")], "completion": [user("b")]}, ", turn 2", "'user' cannot follow 'user'"),
    ([user("a"), user("b"), assistant("c")], ", turn 2", "'user' cannot follow 'user'"),
    ([assistant("b"), user("a")], ", turn 1", "cannot start"),
    ([user("a"), system("s"), assistant("b")], ", turn 2", "'system' cannot follow 'user'"),
    ([*EXCHANGE, assistant("c")], ", turn 3", "'assistant' cannot follow 'assistant'"),
    ([{"role": "tool", "content": "x"}, assistant("b")], ", turn 1", "cannot start"),
    ([user("a"), {"role": "asistant", "content": "b"}], ", turn 2", "did you mean 'assistant'"),
    ([user("a"), assistant(None)], ", turn 2", "'content' must be text but is null"),
    ([user([{"type": "image_url"}]), assistant("b")], ", turn 1", "the model reads text only"),
    *(([user([TEXT, part]), assistant("b")], ", turn 1", "text") for part in ({"text": "a"}, "a", {"type": "text"})),
    *(([user("a"), assistant("b", weight=weight)], ", turn 2", "weight") for weight in (0.5, -1, "1", True, [1])),
    *(([user("a"), assistant("", tool_calls=calls)], ", turn 2", "call") for calls in ("f()", [3], [{"name": 3}])),
    ([user("a")], "", "no turn is from the assistant"),
    ("a", "", "'messages' must be a list"),
    ({"conversations": "a"}, "", "'conversations' must be a list"),
    ({"conversations": [{"from": "huma", "value": "a"}]}, ", turn 1", "'huma' is an unknown speaker"),
    ({"conversations": [{"role": "user"}]}, ", turn 1", "'from' and 'value'"),
    ({"input": "a", "ideal": []}, "", "empty list"),
    ({"instruction": "a", "input": 3, "output": "b"}, "", "'input' must be text"),
    *(({"messages": EXCHANGE, "tools": tools}, "", "'tools' must be") for tools in ("{", "{}", 3, ["clock"])),
]
VALID = {
    "messages": {"messages": EXCHANGE},
    "prompt": {"prompt": "a", "completion": "b"},
    "conversations": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "input": {"input": "a", "ideal": "b"},
    "instruction": {"instruction": "a", "output": "b"},
}


@pytest.mark.parametrize(("row_or_messages", "turn", "text"), INVALID)
def test_invalid_row_is_reported_with_its_turn(row_or_messages: object, turn: str, text: str) -> None:
    row = row_or_messages if isinstance(row_or_messages, dict) else {"messages": row_or_messages}
    valid = VALID[next(iter(row))]
    error = refusal(read, {**valid, "tools": []} if "tools" in row else valid, row)
    assert isinstance(error, BadRowError) and text in error.message and error.location == f"d.jsonl, row 2{turn}"
    assert error.reason == "a weight other than 0 and 1" or text != "weight"


@pytest.mark.parametrize("prompt", [[], EXCHANGE, [assistant("x")], "a", [user(3)]])
def test_prompt_must_end_before_an_answer(prompt: object) -> None:
    refusal(read_prompt, prompt, "the prompt")


def test_tools_can_be_a_list_or_json_text() -> None:
    tool = {"type": "function", "function": {"name": "clock"}}
    for value in ([tool], json.dumps([tool])):
        assert read_tools(value, "row 1") == (tool,)
    assert read_tools(None, "row 1") == read_tools("", "row 1") == ()


def test_json_text_arguments_of_calls_become_objects() -> None:
    """OpenAI's format uses JSON text. Templates render arguments as JSON, so text would be quoted twice."""
    calls = ({"type": "function", "function": {"name": "f", "arguments": a}} for a in ('{"x": 1}', {"x": 1}))
    value, expected = ([call] for call in calls)
    (message,) = read_messages([assistant(None, tool_calls=value)], "messages", "r")
    assert (message["tool_calls"], message["content"]) == (expected, "")
    assert value[0]["function"]["arguments"] == '{"x": 1}'


def test_answer_with_reasoning_only_is_not_blank() -> None:
    for answer, learned in ((assistant("", reasoning_content="hm"), True), (assistant(" "), False)):
        record = conversation([], [user("a"), answer], "row 1")
        assert unlabel_blank_answers(record).learned == (False, learned)


def test_documented_examples_match_their_formats() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\*\*([a-z-]+)\*\*[^\n]*\n```json\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert [form for form, _ in examples] == [form.name for form in FORMS]
    for form, row in examples:
        table = rows_of(json.loads(row))
        assert choose_form(table).name == form
        read_records(table, [0], choose_form(table), {})
