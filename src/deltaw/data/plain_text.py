"""Rows as plain text, without a chat template."""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.data.bad_rows import BadRowError
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Message, unlabel_blank_answers


@dataclass(frozen=True)
class TextSpan:
    """Part of a plain text that is tokenized separately.

    Attributes:
        completion: Append eos.
        learned: True if the part is a label.
        turn: For an answer of a conversation, its message index.
    """

    text: str
    completion: bool
    learned: bool
    turn: int | None = None


def plain_parts(record: Record, location: str) -> list[TextSpan]:
    """Divide a record into parts of plain text.

    Raises:
        BadRowError: if the record has tools or tool calls, which plain text cannot represent.
    """
    if isinstance(record, Text):
        return [TextSpan(record.text, completion=True, learned=bool(record.text.strip()))]
    if isinstance(record, Pair):
        prompt = f"{record.system}\n{record.prompt}" if record.system else record.prompt
        learned = bool(record.completion.strip())
        return [TextSpan(prompt, False, False), TextSpan(record.completion, True, learned)]
    parts: list[TextSpan] = []
    context: list[Message] = []
    record = unlabel_blank_answers(record)
    if record.tools:
        raise _needs_template("tools need", location)
    for turn, (message, learned) in enumerate(zip(record.messages, record.learned, strict=True)):
        if message.get("tool_calls"):
            raise _needs_template("tool calls need", location)
        if message["role"] != "assistant":
            context.append(message)
            continue
        prompt_text = "".join(f"{message['content']}\n" for message in context)
        parts += [TextSpan(prompt_text, False, False), TextSpan(str(message["content"]), True, learned, turn)]
        context = []
    return parts


def _needs_template(subject: str, location: str) -> BadRowError:
    hint = "set data.template: chat, or name a template in data.chat_template"
    return BadRowError(
        f"{subject} a chat template", reason="tools without a chat template", location=location, hint=hint
    )
