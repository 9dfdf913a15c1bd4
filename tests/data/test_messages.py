"""Conversations: weights of turns, tools, calls of tools, system turns in the middle."""

from __future__ import annotations

import pytest

from deltaw.data.messages import Message, conversation, read_messages, read_tools, without_blank_answers
from deltaw.data.report import BadRowError


def chat(*turns: tuple[str, str, dict[str, object]] | tuple[str, str]) -> list[Message]:
    return [{"role": turn[0], "content": turn[1], **(turn[2] if len(turn) > 2 else {})} for turn in turns]


def learned(*turns: tuple[str, str, dict[str, object]] | tuple[str, str]) -> tuple[bool, ...]:
    return conversation([], chat(*turns), "row 1").learned


@pytest.mark.parametrize("weight", [0.5, 2, -1, "1", True, [1]])
def test_other_weights_are_refused_with_the_turn(weight: object) -> None:
    with pytest.raises(BadRowError) as refused:
        learned(("user", "a"), ("assistant", "b", {"weight": weight}))
    assert (refused.value.where, refused.value.reason) == ("row 1, turn 2", "a weight other than 0 and 1")


def test_a_system_turn_may_stand_between_an_answer_and_a_question() -> None:
    turns = (("user", "a"), ("assistant", "b"), ("system", "s"), ("user", "c"), ("assistant", "d"))
    assert learned(*turns) == (False, True, False, False, True)


def test_tools_are_a_list_or_json_text_of_one() -> None:
    tool = {"type": "function", "function": {"name": "clock"}}
    assert read_tools([tool], "row 1") == (tool,)
    assert read_tools('[{"type": "function", "function": {"name": "clock"}}]', "row 1") == (tool,)
    assert read_tools(None, "row 1") == read_tools("", "row 1") == ()
    for wrong in ("{", "{}", 3, ["clock"], {"name": "clock"}):
        with pytest.raises(BadRowError, match="'tools' must be"):
            read_tools(wrong, "row 1")


def test_arguments_of_calls_given_as_json_text_become_objects() -> None:
    """As in the format of OpenAI; templates write them as JSON, so that text would be quoted twice."""
    given = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    (message,) = read_messages([{"role": "assistant", "tool_calls": given, "content": None}], "messages", "r")
    assert message["tool_calls"] == [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert message["content"] == ""
    assert given[0]["function"]["arguments"] == '{"x": 1}'  # type: ignore[index]


@pytest.mark.parametrize("calls", ["f()", [3], [{"function": {}}], [{"function": "f"}], [{"name": 3}]])
def test_calls_without_a_name_are_refused(calls: object) -> None:
    with pytest.raises(BadRowError) as refused:
        read_messages([{"role": "assistant", "content": "", "tool_calls": calls}], "messages", "row 1")
    assert refused.value.where == "row 1, turn 1"


def test_an_answer_of_reasoning_alone_is_not_blank() -> None:
    found = conversation([], chat(("user", "a"), ("assistant", "", {"reasoning_content": "hm"})), "row 1")
    assert without_blank_answers(found).learned == (False, True)
    blank = conversation([], chat(("user", "a"), ("assistant", " ")), "row 1")
    assert without_blank_answers(blank).learned == (False, False)


def test_parts_of_text_become_one_text() -> None:
    parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "are you?"}]
    (message,) = read_messages([{"role": "user", "content": parts}], "messages", "row 1")
    assert message["content"] == "Who\nare you?"
    assert read_messages([{"role": "user", "content": []}], "messages", "row 1")[0]["content"] == ""


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "a.png"}}, {"text": "a"}, "a", {"type": "text"}, None]
)
def test_parts_that_are_not_text_are_refused_with_the_turn(part: object) -> None:
    with pytest.raises(BadRowError) as refused:
        read_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}], "messages", "row 7")
    assert refused.value.where == "row 7, turn 1"
