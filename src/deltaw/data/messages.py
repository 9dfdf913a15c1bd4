"""Conversations: whether a list of messages is valid, which turns are learned, and which tools there are.

It knows single rows; not files, columns or tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaw.data.report import BadRowError
from deltaw.data.row_files import parse
from deltaw.errors import UserError, did_you_mean

Message = dict[str, object]
WRONG_TYPE = "a value of the wrong type"
MALFORMED = "a malformed turn"
OUT_OF_ORDER = "turns out of order"
ROLES = ("system", "user", "assistant", "tool")
# What may precede a turn of each role; None is the beginning.
_MAY_FOLLOW: Mapping[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool", "system"),
    "tool": ("assistant", "tool"),
}
# Where messages hold the reasoning that precedes an answer; chat templates know it by these names.
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``; the last is the assistant's.

    Attributes:
        messages: the turns.
        learned: for each turn, whether it may be a label.
        trailing: turns after the assistant's last one, which were dropped.
        tools: descriptions of the functions that the assistant may call, as templates take them.
    """

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    trailing: int = 0
    tools: tuple[Message, ...] = ()


def is_blank(text: str) -> bool:
    """Return True if a text has no visible character: white space, control and zero-width characters only."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def text_of(value: object, key: str, where: str) -> str:
    """The value of ``key``, which must be text.

    Raises:
        BadRowError: it is not, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise BadRowError(f"'{key}' must be text but is {kind}", reason=WRONG_TYPE, where=where, hint="write a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            what = f"'{key}' holds half of a surrogate pair, which is not text"
            hint = "write the whole character, or remove it"
            raise BadRowError(what, reason="text that is not Unicode", where=where, hint=hint) from error
    return value


def written_text(value: object, column: str, where: str) -> str:
    """Return the text in a cell.

    Raises:
        BadRowError: it is no text, or has no visible character.
    """
    text = text_of(value, column, where)
    if is_blank(text):
        raise empty_text(f"'{column}'", where)
    return text


def empty_text(name: str, where: str) -> BadRowError:
    """Return the error for a text without a visible character."""
    hint = "write the text, or remove the row"
    return BadRowError(f"{name} is empty", reason="an empty text", where=where, hint=hint)


def read_messages(value: object, key: str, where: str) -> list[Message]:
    """A list of messages, each with a known role and text, or parts of text, as content.

    Null keys are dropped.

    Raises:
        BadRowError: it is not such a list; the message names the turn.
    """
    if not isinstance(value, list):
        what = f"'{key}' must be a list of messages but is a {type(value).__name__}"
        hint = 'write it as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
        raise BadRowError(what, reason=WRONG_TYPE, where=where, hint=hint)
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        place = f"{where}, turn {number}"
        if not isinstance(turn, dict):
            what = f"a message must be an object but is a {type(turn).__name__}"
            hint = 'a message is {"role": "user", "content": "…"}'
            raise BadRowError(what, reason=MALFORMED, where=place, hint=hint)
        message: Message = {name: part for name, part in turn.items() if part is not None}
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(f"'{name}'" for name in ROLES)
            what = f"the role is {role!r}" + (f": {did_you_mean(role, ROLES)}" if isinstance(role, str) else "")
            raise BadRowError(what, reason=MALFORMED, where=place, hint=f"the roles are {known}")
        if role == "assistant" and message.get("tool_calls"):
            message.setdefault("content", "")
            message["tool_calls"] = _read_calls(message["tool_calls"], place)
        message["content"] = text_of(_joined(message.get("content"), place), "content", place)
        messages.append(message)
    return messages


def _joined(content: object, where: str) -> object:
    """The content of a turn, its parts joined by line breaks where it is a list of parts of text.

    Raises:
        BadRowError: a part is not text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            what = f"part {number} of 'content' is not text but {kind or type(part).__name__}"
            hint = 'only parts of text can be learned: {"type": "text", "text": "…"}'
            raise BadRowError(what, reason="content that is not text", where=where, hint=hint)
        texts.append(text_of(part.get("text"), "text", where))
    return "\n".join(texts)


def read_tools(value: object, where: str) -> tuple[Message, ...]:
    """The column ``tools``: a list of descriptions of functions, or the same as JSON text.

    Raises:
        BadRowError: it is none.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = parse(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        what = "'tools' must be a list of objects, or JSON text of one"
        hint = 'a tool is {"type": "function", "function": {"name": "…", "parameters": {…}}}'
        raise BadRowError(what, reason=WRONG_TYPE, where=where, hint=hint)
    return tuple(value)


def conversation(
    before: list[Message], after: list[Message], where: str, tools: tuple[Message, ...] = ()
) -> Conversation:
    """Join the context and the part that may be labels, and check the order of the turns.

    Raises:
        BadRowError: a turn is out of order or has a wrong weight, or no turn is the assistant's.
    """
    turns = before + after
    check_order(turns, where)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    if last < len(before):
        hint = "end the conversation with a message of the role 'assistant'"
        raise BadRowError("no turn is the assistant's: there is no label", reason="no answer", where=where, hint=hint)
    weights = [_weight(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]
    learned = tuple(turn["role"] == "assistant" and i >= len(before) and weights[i] for i, turn in enumerate(turns))
    messages = tuple({key: part for key, part in turn.items() if key != "weight"} for turn in turns)
    return Conversation(messages[: last + 1], learned[: last + 1], len(turns) - last - 1, tools)


def check_order(turns: Sequence[Message], where: str) -> None:
    """User and assistant by turns; a tool answers the assistant; a system message stands before either.

    Raises:
        BadRowError: a turn is out of order.
    """
    previous: str | None = None
    for number, turn in enumerate(turns, start=1):
        role = str(turn["role"])
        if role not in _MAY_FOLLOW[previous]:
            after = f"cannot follow '{previous}'" if previous else "cannot begin a conversation"
            allowed = " or ".join(f"'{name}'" for name in _MAY_FOLLOW[previous])
            what = f"turn {number} is out of order: '{role}' {after}"
            raise BadRowError(what, reason=OUT_OF_ORDER, where=f"{where}, turn {number}", hint=f"expected {allowed}")
        previous = role


def read_prompt(value: object, where: str) -> list[Message]:
    """Messages that ask for an answer.

    Raises:
        UserError: they are not messages, are out of order, or end with the assistant's.
    """
    messages = read_messages(value, "messages", where)
    check_order(messages, where)
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError("there is no question to answer", where=where, hint="end with a message of the user")
    return messages


def without_blank_answers(found: Conversation) -> Conversation:
    """The same, with empty answers of the assistant marked as no labels."""
    spoken = [bool(str(m["content"]).strip() or m.get("tool_calls") or reasoning(m)) for m in found.messages]
    return replace(found, learned=tuple(may and said for may, said in zip(found.learned, spoken, strict=True)))


def reasoning(message: Message) -> str:
    """The reasoning that a message has apart from its content; empty if it has none."""
    return str(next((message[key] for key in REASONING if message.get(key)), "")).strip()


def without_nulls(value: object) -> object:
    """A row's value without the keys that typed columns fill with null where a row has no value."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def _weight(turn: Message, where: str) -> bool:
    """Whether a turn is trained on, by its ``weight``: 0 or 1, and 1 if it has none."""
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        hint = "a turn is trained on (1) or not (0)"
        raise BadRowError(f"the weight is {weight!r}", reason="a weight other than 0 and 1", where=where, hint=hint)
    return weight == 1


def _read_calls(value: object, where: str) -> list[Any]:
    """Tool calls, their arguments as objects: templates write them as JSON, text would be quoted twice."""
    hint = 'a call is {"type": "function", "function": {"name": "…", "arguments": {…}}}'
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRowError("'tool_calls' must be a list of objects", reason=MALFORMED, where=where, hint=hint)
    calls = []
    for call in value:
        call = {key: part for key, part in call.items() if part is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError("a tool call has no name", reason=MALFORMED, where=where, hint=hint)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                parsed = parse(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls
