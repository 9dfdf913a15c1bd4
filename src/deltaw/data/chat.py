"""Conversations through a chat template: what precedes each answer when it is written, and the answer.

A chat template is arbitrary code, so what it renders is checked: the answer must be there as the row has it,
after the prompt that a model is given to write it, and so must all that precedes it. Templates that render an
earlier turn differently once more turns follow are no difficulty, since every answer is taken in the context
that it is written in. This module knows text; tokens are :mod:`deltaw.data.templates`'s.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltaw.data.bad_rows import BadRowError
from deltaw.data.chat_template import asks_for_date, with_date
from deltaw.data.messages import Conversation, Message, reasoning
from deltaw.data.rendering import FAULTS, rendered
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_THOUGHT_BEGINS = re.compile(r"^\s*<think>\s*")
_HINT = (
    "set data.template: plain to do without the template, data.chat_template to one of your own, or change "
    "the row"
)


@dataclass(frozen=True)
class Answer:
    """One answer of the assistant in the context that it is written in.

    Attributes:
        turn: its place among the messages.
        prompt: what a model is given to write it, rendered.
        said: the answer, through the special token that ends its turn.
        ended: whether there is such a token; otherwise the answer ends with the tokenizer's eos.
        learned: whether it is a label.
        text: the answer alone, without end marks.
    """

    turn: int
    prompt: str
    said: str
    ended: bool
    learned: bool
    text: str


class ChatRenderer:
    """Renders conversations with one tokenizer's template.

    Args:
        tokenizer: with a chat template.
        marks: the special tokens as text, longest first. ends: those that end a text.
        date: what templates that ask for the current date are told, as 2026-01-31.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, ...], ends: frozenset[str], date: str
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._ends = ends
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._date = date
        self._templates: dict[bool, str] = {}

    def template(self, with_tools: bool = False) -> str:
        """The template's text; some tokenizers have another for conversations with tools."""
        if with_tools not in self._templates:
            try:
                text = self._tokenizer.get_chat_template(None, [{}] if with_tools else None)
            except ValueError as error:
                raise UserError(
                    "the tokenizer has several chat templates and none is the default",
                    where="data.template: chat",
                    hint="name a file with one in data.chat_template, or set data.template: plain",
                ) from error
            self._templates[with_tools] = with_date(text, self._date) if asks_for_date(text) else text
        return self._templates[with_tools]

    def render(
        self, messages: Sequence[Message], where: str, *, generation: bool, tools: Sequence[Message] = ()
    ) -> str:
        """The messages as text; with ``generation``, through what opens the assistant's turn.

        Raises:
            BadRowError: the template does not accept them.
            TemplateLimitError: it costs more than a rendering may; no other row is tried then.
        """
        try:
            return self._rendered(messages, generation, tools)
        except FAULTS as error:
            if any(message.get("tool_calls") for message in messages):
                # Some templates want the arguments of calls as JSON text.
                with contextlib.suppress(*FAULTS):
                    return self._rendered([_with_text_arguments(m) for m in messages], generation, tools)
            raise BadRowError(
                f"the model's chat template does not accept this conversation: {error}",
                reason="refused by the chat template",
                where=where,
                hint="change the conversation, or set data.template: plain",
            ) from error

    def _rendered(self, messages: Sequence[Message], generation: bool, tools: Sequence[Message]) -> str:
        # As the tokenizer's apply_chat_template does, which looks up its special tokens each time.
        template = self.template(bool(tools))
        text = rendered(template, messages, generation=generation, tools=tools, variables=self._special)
        text.encode("utf-8")  # raises for half of a surrogate pair, which tokenizers do not take
        return text

    def answers(self, conversation: Conversation, where: str, *, only_last: bool) -> list[Answer]:
        """The answers that are labels, each in its context; if there are none, the last one.

        Raises:
            BadRowError: the template does not render the conversation, or not the answer as it is.
        """
        last = len(conversation.messages) - 1
        learned = [n for n, may in enumerate(conversation.learned) if may and (n == last or not only_last)]
        answers = [self._answer(conversation, turn, where) for turn in learned]
        if not answers:
            prompt = self.render(
                conversation.messages[:last], where, generation=True, tools=conversation.tools
            )
            content = str(conversation.messages[last]["content"])
            answers = [Answer(last, prompt, "", True, False, self.without_marks(content))]
        self.check_context(answers[-1], conversation, where)
        return answers

    def check_context(self, answer: Answer, conversation: Conversation, where: str) -> None:
        """Raise a BadRowError if the prompt of ``answer`` lacks a message that is not the assistant's, or a
        tool."""
        for number, message in enumerate(conversation.messages[: answer.turn], start=1):
            if message["role"] != "assistant" and not _shows(answer.prompt, str(message["content"])):
                raise _refused(f"it omits the content of turn {number} ('{message['role']}')", where)
        for tool in conversation.tools:
            name = _name_of(tool)
            if name and name not in answer.prompt:
                raise _refused(f"it omits the tool '{name}'", where)

    def without_marks(self, text: str) -> str:
        """An answer without the special tokens that close it."""
        body, end_of_turn = self._peel(text)
        return text if end_of_turn is None else body

    def _answer(self, conversation: Conversation, turn: int, where: str) -> Answer:
        messages, tools = conversation.messages, conversation.tools
        message = messages[turn]
        prompt = self.render(messages[:turn], where, generation=True, tools=tools)
        end = self.render(messages[: turn + 1], where, generation=False, tools=tools)
        said = _after(prompt, end, str(messages[turn - 1]["content"]))
        if said is None:
            raise _refused(f"the prompt before turn {turn + 1} is not found in the rendered turn", where)
        body, end_of_turn = self._peel(said)
        content = self.without_marks(str(message["content"]))
        opened = _OPEN_THOUGHT.search(prompt) is not None
        thinks = self._thinking(opened, body, message, content, turn, where)
        if thinks is not None:
            closing = "" if end_of_turn is None else said[len(body) : end_of_turn]
            return Answer(turn, prompt, thinks + closing, end_of_turn is not None, True, content)
        if message.get("tool_calls"):
            shown = _shows_calls(body, message)
        else:
            shown = _ends_with(body, _THOUGHT_BEGINS.sub("", content) if opened else content)
        if not shown and end_of_turn is not None:
            raise _refused(f"it changes the answer in turn {turn + 1}", where)
        if not shown and (
            any(mark in said for mark in self._marks)
            or not self._heeds_generation(conversation, turn, prompt)
        ):
            raise _refused(f"it adds text after the answer in turn {turn + 1}", where)
        said = said.rstrip() if end_of_turn is None else said[:end_of_turn]
        return Answer(turn, prompt, said, end_of_turn is not None, True, content)

    def _thinking(
        self, opened: bool, body: str, message: Message, content: str, turn: int, where: str
    ) -> str | None:
        """The answer with the reasoning that the template dropped from it; None if it dropped none.

        The reasoning is what a model has to write before its answer, so it is put back where the answer is
        learned. The prompt may already open it (``opened``).
        """
        apart = reasoning(message)
        if not apart and "</think>" not in content:
            if opened and "</think>" not in body:
                raise _refused(f"it opens a thought, and turn {turn + 1} has none", where)
            return None
        if "</think>" in body or (apart and _shows(body, apart)):
            if not _shows(body, apart or _THOUGHT_BEGINS.sub("", content).partition("</think>")[0]):
                raise _refused(f"it changes the reasoning of turn {turn + 1}", where)
            return None
        whole = f"<think>\n{apart}\n</think>\n\n{content}" if apart else content
        tagged = not apart or "</think>" in self.template()
        if message.get("tool_calls") or not tagged or not _ends_with(whole, body):
            raise _refused(f"it drops the reasoning of turn {turn + 1}", where)
        # White space before the answer is the template's, unless it is what stood behind the thought.
        space = body[: len(body) - len(body.lstrip())]
        if opened or whole.rpartition("</think>")[2].startswith(space):
            space = ""
        return space + (_THOUGHT_BEGINS.sub("", whole) if opened else whole.lstrip()).rstrip()

    def _heeds_generation(self, conversation: Conversation, turn: int, prompt: str) -> bool:
        """Whether the template renders the prompt for an answer only on request."""
        before = conversation.messages[:turn]
        return self.render(before, "", generation=False, tools=conversation.tools) != prompt

    def _peel(self, text: str) -> tuple[str, int | None]:
        """Text without the special tokens that close it, and where the end of the turn ends; None if no such
        token closes the text.

        That is the first of them that ends a text, or simply the first: ``<|end|>`` where a template writes
        ``<|end|><|endoftext|>``.
        """
        stop, end, is_end = len(text.rstrip()), None, False
        while True:
            mark = next((mark for mark in self._marks if text.endswith(mark, 0, stop)), None)
            if mark is None:
                return text[:stop], end
            if mark in self._ends or not is_end:
                end, is_end = stop, mark in self._ends
            stop = len(text[: stop - len(mark)].rstrip())


def _after(prompt: str, end: str, asked: str) -> str | None:
    """What follows the prompt in the rendered turn.

    Some templates render what precedes an answer differently once it is there: a system message that stands
    in the last question only, a thought that only the prompt opens. Then it is what follows the last
    occurrence of the prompt's end, from the last message on. None if that does not occur.
    """
    if end.startswith(prompt):
        return end[len(prompt) :]
    place = prompt.rfind(asked.strip()) if asked.strip() else -1
    if place < 0:
        return None
    ending = prompt[place:]
    at = end.rfind(ending)
    if at >= 0:
        return end[at + len(ending) :]
    unopened = _OPEN_THOUGHT.sub("", ending)
    at = end.rfind(unopened)
    if at < 0 or not unopened:
        return None
    return _THOUGHT_BEGINS.sub("", end[at + len(unopened) :])


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _ends_with(text: str, content: str) -> bool:
    """Whether ``text`` ends with ``content``, ignoring white space, which templates trim."""
    return text.endswith(content.strip()) or _squeeze(text).endswith(_squeeze(content))


def _shows(text: str, content: str) -> bool:
    """Whether ``text`` contains ``content``: as it is, ignoring white space, or as a JSON string."""
    if content.strip() in text or _squeeze(content) in _squeeze(text):
        return True
    return json.dumps(content, ensure_ascii=False)[1:-1] in text or json.dumps(content)[1:-1] in text


def _shows_calls(text: str, message: Message) -> bool:
    """Whether an answer with tool calls is rendered with its text and the names of the tools."""
    calls = message["tool_calls"] if isinstance(message["tool_calls"], list) else []
    names = [_name_of(call) for call in calls if isinstance(call, dict)]
    return (
        _shows(text, str(message["content"])) and bool(names) and all(name and name in text for name in names)
    )


def _with_text_arguments(message: Message) -> Message:
    calls = []
    for call in message.get("tool_calls") or ():  # type: ignore[attr-defined]
        function = dict(call.get("function", call))
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


def _name_of(tool: Message) -> str:
    """The name of a tool or of a call of one."""
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _refused(what: str, where: str) -> BadRowError:
    return BadRowError(
        f"the labels cannot be found with the model's chat template: {what}",
        reason="labels not found with the chat template",
        where=where,
        hint=_HINT,
    )
