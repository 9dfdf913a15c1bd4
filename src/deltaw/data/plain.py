"""Plain text instead of a chat template: what the parts of a record are, and which of them are labels.

It knows text; tokens are :mod:`deltaw.data.templates`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.data.bad_rows import BadRowError
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Message, without_blank_answers


@dataclass(frozen=True)
class PlainPart:
    """A part of plain text that is tokenized on its own.

    Attributes:
        completion: whether it ends with eos. learned: whether it is a label.
        turn: of a conversation's answer, its place among the messages.
    """

    text: str
    completion: bool
    learned: bool
    turn: int | None = None


def plain_parts(record: Record, where: str) -> list[PlainPart]:
    """A record as parts of text.

    Raises:
        BadRowError: it has tools, which plain text has no form for.
    """
    if isinstance(record, Text):
        return [PlainPart(record.text, completion=True, learned=bool(record.text.strip()))]
    if isinstance(record, Pair):
        prompt = f"{record.system}\n{record.prompt}" if record.system else record.prompt
        learned = bool(record.completion.strip())
        return [PlainPart(prompt, False, False), PlainPart(record.completion, True, learned)]
    parts: list[PlainPart] = []
    context: list[Message] = []
    record = without_blank_answers(record)
    if record.tools:
        raise _needs_template("tools need", where)
    for turn, (message, learned) in enumerate(zip(record.messages, record.learned, strict=True)):
        if message.get("tool_calls"):
            raise _needs_template("tool calls need", where)
        if message["role"] != "assistant":
            context.append(message)
            continue
        parts.append(PlainPart(_context(context), False, False))
        parts.append(PlainPart(str(message["content"]), True, learned, turn))
        context = []
    return parts


def _context(messages: Sequence[Message]) -> str:
    """Messages that precede an answer, one below another."""
    return "".join(f"{message['content']}\n" for message in messages)


def _needs_template(what: str, where: str) -> BadRowError:
    return BadRowError(
        f"{what} a chat template",
        reason="tools without a chat template",
        where=where,
        hint="set data.template: chat, or name a template in data.chat_template",
    )
