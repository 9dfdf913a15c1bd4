"""Validation of conversations: messages, order of roles, labels and tools."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deltaw.data.bad_rows import BadRowError
from deltaw.data.json_values import parse
from deltaw.data.row_images import IMAGE_PARTS, RowImage
from deltaw.errors import UserError, did_you_mean

Message = dict[str, object]
WRONG_TYPE = "a value of the wrong type"
MALFORMED = "a malformed turn"
OUT_OF_ORDER = "turns out of order"
ROLES = ("system", "user", "assistant", "tool")
# Roles that may follow each role. None is the start of a conversation.
_MAY_FOLLOW: Mapping[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool", "system"),
    "tool": ("assistant", "tool"),
}
# Keys of the reasoning before an answer, as chat templates name them.
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Conversation:
    """Messages with ``role`` and ``content``, the last of which is from the assistant.

    Attributes:
        messages: Turns.
        learned: For each turn, True if it may be a label.
        trailing: Number of dropped turns after the last assistant turn.
        tools: Definitions of the functions that the assistant may call, as templates expect them.
        images: Images that the messages refer to.
    """

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    trailing: int = 0
    tools: tuple[Message, ...] = ()
    images: tuple[RowImage, ...] = ()


def is_blank(text: str) -> bool:
    """Return True if a text has no visible character: white space, control and zero-width characters only."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def text_of(value: object, key: str, location: str) -> str:
    """Return the value of ``key``, which must be text.

    Raises:
        BadRowError: if it is not text, or contains a lone surrogate.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise BadRowError(f"'{key}' must be text but is {kind}", reason=WRONG_TYPE, location=location, hint="use text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            message = f"'{key}' contains half of a surrogate pair, which is not text"
            hint = "write the complete character, or remove it"
            raise BadRowError(message, reason="text that is not Unicode", location=location, hint=hint) from error
    return value


def cell_text(value: object, column: str, location: str) -> str:
    """Return the text of a cell.

    Raises:
        BadRowError: if it is not text, or has no visible character.
    """
    text = text_of(value, column, location)
    if is_blank(text):
        raise empty_text(f"'{column}'", location)
    return text


def empty_text(name: str, location: str) -> BadRowError:
    """Return the error for a text without a visible character."""
    hint = "write the text, or remove the row"
    return BadRowError(f"{name} is empty", reason="an empty text", location=location, hint=hint)


def read_messages(value: object, key: str, location: str) -> list[Message]:
    """Read a list of messages with a valid role and text, or text parts, as content. Null keys are dropped.

    Raises:
        BadRowError: if the value is not such a list.
    """
    if not isinstance(value, list):
        error_text = f"'{key}' must be a list of messages but is a {type(value).__name__}"
        hint = 'write it as [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]'
        raise BadRowError(error_text, reason=WRONG_TYPE, location=location, hint=hint)
    messages: list[Message] = []
    for number, turn in enumerate(value, start=1):
        turn_location = f"{location}, turn {number}"
        if not isinstance(turn, dict):
            error_text = f"a message must be an object but is a {type(turn).__name__}"
            hint = 'a message is {"role": "user", "content": "…"}'
            raise BadRowError(error_text, reason=MALFORMED, location=turn_location, hint=hint)
        message: Message = {name: value_of_key for name, value_of_key in turn.items() if value_of_key is not None}
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            roles = ", ".join(f"'{name}'" for name in ROLES)
            error_text = f"the role is {role!r}" + (f": {did_you_mean(role, ROLES)}" if isinstance(role, str) else "")
            raise BadRowError(error_text, reason=MALFORMED, location=turn_location, hint=f"the roles are {roles}")
        if role == "assistant" and message.get("tool_calls"):
            message.setdefault("content", "")
            message["tool_calls"] = _read_calls(message["tool_calls"], turn_location)
        message["content"] = text_of(_join_parts(message.get("content"), turn_location), "content", turn_location)
        messages.append(message)
    return messages


def _join_parts(content: object, location: str) -> object:
    """Return the content of a message. A list of text parts is joined by line breaks.

    Raises:
        BadRowError: if a part is not text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text":
            message = f"part {number} of 'content' is not text but {kind or type(part).__name__}"
            hint = 'only text parts are supported: {"type": "text", "text": "…"}'
            if kind in IMAGE_PARTS:
                message = f"part {number} of 'content' is an image, and the model reads text only"
                hint = "use a vision-language model, or remove the image"
            raise BadRowError(message, reason="content that is not text", location=location, hint=hint)
        texts.append(text_of(part.get("text"), "text", location))
    return "\n".join(texts)


def read_tools(value: object, location: str) -> tuple[Message, ...]:
    """Read the column ``tools``: a list of function definitions, or the same as JSON text.

    Raises:
        BadRowError: if it is neither.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = parse(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        message = "'tools' must be a list of objects, or JSON text of one"
        hint = 'a tool is {"type": "function", "function": {"name": "…", "parameters": {…}}}'
        raise BadRowError(message, reason=WRONG_TYPE, location=location, hint=hint)
    return tuple(value)


def conversation(
    context: list[Message], turns: list[Message], location: str, tools: tuple[Message, ...] = ()
) -> Conversation:
    """Build a conversation from context and trainable turns, and check the turn order.

    Args:
        context: Turns that are never labels.
        turns: Turns that may be labels.

    Raises:
        BadRowError: if a turn is out of order or has an invalid weight, or if no turn is from the assistant.
    """
    all_turns = context + turns
    check_order(all_turns, location)
    last = max((i for i, turn in enumerate(all_turns) if turn["role"] == "assistant"), default=-1)
    if last < len(context):
        hint = "end the conversation with a message of the role 'assistant'"
        raise BadRowError("no turn is from the assistant", reason="no answer", location=location, hint=hint)
    weights = [_weight(turn, f"{location}, turn {number}") for number, turn in enumerate(all_turns, start=1)]
    learned = tuple(
        turn["role"] == "assistant" and i >= len(context) and weights[i] for i, turn in enumerate(all_turns)
    )
    messages = tuple({key: part for key, part in turn.items() if key != "weight"} for turn in all_turns)
    return Conversation(messages[: last + 1], learned[: last + 1], len(all_turns) - last - 1, tools)


def check_order(turns: Sequence[Message], location: str) -> None:
    """Check that user and assistant alternate, that tool turns follow assistant or tool turns, and that a system turn
    precedes either.

    Raises:
        BadRowError: if a turn is out of order.
    """
    previous: str | None = None
    for number, turn in enumerate(turns, start=1):
        role = str(turn["role"])
        if role not in _MAY_FOLLOW[previous]:
            problem = f"cannot follow '{previous}'" if previous else "cannot start a conversation"
            allowed = " or ".join(f"'{name}'" for name in _MAY_FOLLOW[previous])
            message = f"turn {number} is out of order: '{role}' {problem}"
            raise BadRowError(
                message, reason=OUT_OF_ORDER, location=f"{location}, turn {number}", hint=f"expected {allowed}"
            )
        previous = role


def read_prompt(value: object, location: str) -> list[Message]:
    """Read messages that end with a request for an answer.

    Raises:
        UserError: if the value is not a list of messages, is out of order, or ends with an assistant turn.
    """
    messages = read_messages(value, "messages", location)
    check_order(messages, location)
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError("the prompt has no question to answer", location=location, hint="end with a user message")
    return messages


def unlabel_blank_answers(record: Conversation) -> Conversation:
    """Return the conversation with empty assistant turns excluded from the labels."""
    has_content = [bool(str(m["content"]).strip() or m.get("tool_calls") or reasoning(m)) for m in record.messages]
    return replace(record, learned=tuple(all(pair) for pair in zip(record.learned, has_content, strict=True)))


def reasoning(message: Message) -> str:
    """Return the reasoning of a message, or an empty string."""
    return str(next((message[key] for key in REASONING if message.get(key)), "")).strip()


def drop_nulls(value: object) -> object:
    """Remove keys that are null in nested mappings, which typed columns contain for missing values."""
    if isinstance(value, Mapping):
        return {key: drop_nulls(part) for key, part in value.items() if part is not None}
    return [drop_nulls(part) for part in value] if isinstance(value, list | tuple) else value


def _weight(turn: Message, location: str) -> bool:
    """Return True if a turn is trained on: its ``weight`` is 1 (the default), not 0."""
    weight = turn.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        hint = "a turn is trained on (1) or not (0)"
        raise BadRowError(f"weight is {weight!r}", reason="a weight other than 0 and 1", location=location, hint=hint)
    return weight == 1


def _read_calls(value: object, location: str) -> list[Any]:
    """Return tool calls with arguments as objects. Templates serialize them as JSON and would quote text twice."""
    hint = 'a call is {"type": "function", "function": {"name": "…", "arguments": {…}}}'
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRowError("'tool_calls' must be a list of objects", reason=MALFORMED, location=location, hint=hint)
    calls = []
    for call in value:
        call = {key: part for key, part in call.items() if part is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError("a tool call has no name", reason=MALFORMED, location=location, hint=hint)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                parsed = parse(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls
