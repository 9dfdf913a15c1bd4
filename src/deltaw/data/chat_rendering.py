"""Rendering of conversations with a chat template.

A chat template is arbitrary code, so that its output is checked: the prompt must contain all context, and the answer
must follow it unchanged. Each answer is rendered in the context in which it is generated, because some templates render
earlier turns differently when more turns follow.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaw.data.bad_rows import BadRowError, OnBadRow
from deltaw.data.chat_template import asks_for_date, with_date
from deltaw.data.messages import Conversation, Message, reasoning
from deltaw.data.rendering import (
    FAULTS,
    STAND_IN,
    ConversationPrefixes,
    complete_template,
    missing_prefix,
    render_batch,
)
from deltaw.data.row_images import MARKER, ImagePlacer, for_template
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_THOUGHT_BEGINS = re.compile(r"^\s*<think>\s*")
_HINT = "set data.template: plain, name another template in data.chat_template, or change the row"


@dataclass(frozen=True)
class AssistantTurn:
    """One assistant answer with the prompt that it is generated from.

    Attributes:
        turn: Index of the message.
        prompt: Rendered prompt.
        completion: Rendered answer, including the special token that ends the turn.
        has_end_token: True if the answer ends with a special token. Otherwise the tokenizer's eos is appended.
        learned: True if the answer is a label.
        text: Answer without end marks.
    """

    turn: int
    prompt: str
    completion: str
    has_end_token: bool
    learned: bool
    text: str


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: Tokenizer with a chat template.
        marks: Special tokens as text, longest first.
        end_marks: Special tokens that end a text.
        date: Current date for templates that use it, for example 2026-01-31.
        images: Defines how the template reads images, for a vision-language model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        marks: tuple[str, ...],
        end_marks: frozenset[str],
        date: str,
        images: ImagePlacer | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._end_marks = end_marks
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self._date = date
        self._images = images
        self._templates: dict[bool, str] = {}

    @functools.cached_property
    def _reads_parts(self) -> bool:
        """True if the template renders a content part of type image as the placeholder."""
        assert self._images is not None
        parts: list[dict[str, str]] = [{"type": "image"}, {"type": "text", "text": STAND_IN}]
        conversation = ConversationPrefixes([{"role": "user", "content": parts}], [(1, True)])
        ((text,),) = render_batch(self.template(), [conversation], self._special)
        return isinstance(text, str) and text.count(self._images.placeholder) == 1

    def template(self, with_tools: bool = False) -> str:
        """Return the template with a prefix of answers. Some tokenizers have a separate template for tools."""
        if with_tools not in self._templates:
            text = self._read_template(with_tools)
            self._templates[with_tools] = complete_template(text, missing_prefix(text, self._special))
        return self._templates[with_tools]

    @property
    def added_prefix(self) -> str:
        """Return the role header that :meth:`template` adds, or an empty string."""
        return missing_prefix(self._read_template(), self._special)

    def _read_template(self, with_tools: bool = False) -> str:
        try:
            text = self._tokenizer.get_chat_template(None, [{}] if with_tools else None)
        except ValueError as error:
            message = "the tokenizer has several chat templates and no default"
            hint = "name a file with one in data.chat_template, or set data.template: plain"
            raise UserError(message, location="data.template: chat", hint=hint) from error
        return with_date(text, self._date) if asks_for_date(text) else text

    def render(
        self, messages: Sequence[Message], location: str, *, generation: bool, tools: Sequence[Message] = ()
    ) -> str:
        """Render messages.

        Args:
            generation: Append the prefix of an assistant message.

        Raises:
            BadRowError: if the template does not accept the messages.
            TemplateLimitError: if the template exceeds a limit. This error is not limited to one row.
        """
        conversation = ConversationPrefixes(messages, [(len(messages), generation)], tools)
        (texts,) = self._render_batch([conversation])
        return next(self._accepted(conversation, texts, location))

    def _render_batch(self, conversations: Sequence[ConversationPrefixes]) -> list[list[str | Exception]]:
        # Equivalent to apply_chat_template, which looks up the special tokens in each call.
        rendered: dict[int, list[str | Exception]] = {}
        if (placer := self._images) is not None and conversations:
            placeholder = None if self._reads_parts else placer.placeholder
            conversations = [
                replace(item, messages=[for_template(message, placeholder) for message in item.messages])
                for item in conversations
            ]
        for with_tools in (False, True):
            group = [index for index, item in enumerate(conversations) if bool(item.tools) is with_tools]
            if group:
                items = [conversations[index] for index in group]
                rendered |= zip(group, render_batch(self.template(with_tools), items, self._special), strict=True)
        return [rendered[index] for index in range(len(conversations))]

    def _accepted(
        self, conversation: ConversationPrefixes, texts: Sequence[str | Exception], location: str
    ) -> Iterator[str]:
        """Yield the rendered prefixes, and raise a BadRowError for the first one that the template rejects."""
        for (count, generation), text in zip(conversation.prefixes, texts, strict=True):
            messages = conversation.messages[:count]
            if isinstance(text, Exception) and any(turn.get("tool_calls") for turn in messages):
                # Some templates expect the arguments of calls as JSON text.
                with contextlib.suppress(*FAULTS):
                    changed = [_with_text_arguments(message) for message in messages]
                    retry = ConversationPrefixes(changed, [(count, generation)], conversation.tools)
                    ((new_text,),) = self._render_batch([retry])
                    text = text if isinstance(new_text, Exception) else new_text
            if isinstance(text, Exception):
                message = f"the model's chat template does not accept this conversation: {text}"
                hint = "change the conversation, or set data.template: plain"
                reason = "refused by the chat template"
                raise BadRowError(message, reason=reason, location=location, hint=hint) from text
            yield text

    def answers(
        self, conversations: Mapping[int, Conversation], locations: Sequence[str], on_bad: OnBadRow, *, only_last: bool
    ) -> dict[int, list[AssistantTurn]]:
        """Return the answers that are labels, each with its prompt. If no answer is a label, return the last one.

        Args:
            conversations: Conversations by the index of their record.
            locations: Location of each record.
            on_bad: Receives the errors of conversations that the template rejects, or whose answers it changes.
        """
        turns = {index: _label_turns(conversation, only_last) for index, conversation in conversations.items()}
        batch = [
            ConversationPrefixes(conversation.messages, _prefixes(conversation, turns[index]), conversation.tools)
            for index, conversation in conversations.items()
        ]
        answers: dict[int, list[AssistantTurn]] = {}
        for index, item, texts in zip(conversations, batch, self._render_batch(batch), strict=True):
            location = locations[index]
            try:
                accepted = self._accepted(item, texts, location)
                answers[index] = self._answers(conversations[index], turns[index], accepted, location)
            except BadRowError as error:
                on_bad(index, error)
        return answers

    def _answers(
        self, conversation: Conversation, turns: Sequence[int], texts: Iterator[str], location: str
    ) -> list[AssistantTurn]:
        answers = [self._answer(conversation, turn, next(texts), next(texts), location) for turn in turns]
        if not answers:
            last = len(conversation.messages) - 1
            content = str(conversation.messages[last]["content"])
            answers = [AssistantTurn(last, next(texts), "", True, False, self.strip_end_marks(content))]
        self.check_context(answers[-1], conversation, location)
        return answers

    def render_reply(self, messages: Sequence[Message], reply: Message, tools: Sequence[Message]) -> str:
        """Return the text between the end of an answer to ``messages`` and the next answer, with ``reply`` in it.

        Raises:
            BadRowError: if the template does not accept the reply, or omits it.
        """
        location = "the environment's text"
        answer: Message = {"role": "assistant", "content": STAND_IN}
        text = self.render([*messages, answer, reply], location, generation=True, tools=tools)
        _, separator, rest = text.rpartition(STAND_IN)
        if not separator or not _shows(rest, str(reply["content"])):
            raise label_error(f"it omits the content of a turn ('{reply['role']}')", location)
        end = next((end for end in self._end_marks if rest.lstrip().startswith(end)), "")
        return rest.partition(end)[2] if end else rest

    def check_context(self, answer: AssistantTurn, conversation: Conversation, location: str) -> None:
        """Raise a BadRowError if the prompt of ``answer`` omits a tool, or a message of another role."""
        for number, message in enumerate(conversation.messages[: answer.turn], start=1):
            texts = self._texts_of(message)
            if message["role"] != "assistant" and not all(_shows(answer.prompt, text) for text in texts):
                raise label_error(f"it omits the content of turn {number} ('{message['role']}')", location)
        for tool in conversation.tools:
            name = _name_of(tool)
            if name and name not in answer.prompt:
                raise label_error(f"it omits the tool '{name}'", location)

    def _texts_of(self, message: Message) -> list[str]:
        """Return the texts of a message, between its images."""
        content = str(message["content"])
        return [content] if self._images is None else content.split(MARKER)

    def strip_end_marks(self, text: str) -> str:
        """Remove the special tokens at the end of an answer."""
        body, end_of_turn = self._peel(text)
        return text if end_of_turn is None else body

    def _answer(self, conversation: Conversation, turn: int, prompt: str, end: str, location: str) -> AssistantTurn:
        """Return the answer of a turn.

        Args:
            prompt: Rendered prompt.
            end: Rendered messages through the answer.
        """
        messages = conversation.messages
        tools = conversation.tools
        message = messages[turn]
        completion = _text_after_prompt(prompt, end, self._texts_of(messages[turn - 1])[-1])
        if completion is None:
            raise label_error(f"the prompt before turn {turn + 1} is not found in the rendered turn", location)
        body, end_of_turn = self._peel(completion)
        content = self.strip_end_marks(str(message["content"]))
        has_open_thought = _OPEN_THOUGHT.search(prompt) is not None
        with_reasoning = self._thinking(has_open_thought, body, message, content, turn, location)
        if with_reasoning is not None:
            closing = "" if end_of_turn is None else completion[len(body) : end_of_turn]
            return AssistantTurn(turn, prompt, with_reasoning + closing, end_of_turn is not None, True, content)
        if message.get("tool_calls"):
            is_unchanged = _shows_calls(body, message)
        else:
            is_unchanged = _ends_with(body, _THOUGHT_BEGINS.sub("", content) if has_open_thought else content)
        if not is_unchanged and end_of_turn is not None:
            raise label_error(f"it changes the answer in turn {turn + 1}", location)
        marked = any(mark in completion for mark in self._marks)
        # Some templates ignore add_generation_prompt.
        if not is_unchanged and (marked or self.render(messages[:turn], "", generation=False, tools=tools) == prompt):
            raise label_error(f"it adds text after the answer in turn {turn + 1}", location)
        completion = completion.rstrip() if end_of_turn is None else completion[:end_of_turn]
        return AssistantTurn(turn, prompt, completion, end_of_turn is not None, True, content)

    def _thinking(
        self, has_open_thought: bool, body: str, message: Message, content: str, turn: int, location: str
    ) -> str | None:
        """Return the answer with the reasoning that the template dropped from it, or None if the reasoning is complete.

        The model has to generate the reasoning before its answer, so that it is restored in labels.

        Args:
            has_open_thought: True if the prompt ends with an open ``<think>`` tag.
        """
        thought = reasoning(message)
        if not thought and "</think>" not in content:
            if has_open_thought and "</think>" not in body:
                raise label_error(f"it opens a thought, and turn {turn + 1} has no reasoning", location)
            return None
        if "</think>" in body or (thought and _shows(body, thought)):
            if not _shows(body, thought or _THOUGHT_BEGINS.sub("", content).partition("</think>")[0]):
                raise label_error(f"it changes the reasoning of turn {turn + 1}", location)
            return None
        full_answer = f"<think>\n{thought}\n</think>\n\n{content}" if thought else content
        has_tags = not thought or "</think>" in self.template()
        if message.get("tool_calls") or not has_tags or not _ends_with(full_answer, body):
            raise label_error(f"it drops the reasoning of turn {turn + 1}", location)
        # White space before the answer is from the template, unless it followed the thought in the message.
        space = body[: len(body) - len(body.lstrip())]
        if has_open_thought or full_answer.rpartition("</think>")[2].startswith(space):
            space = ""
        return space + (_THOUGHT_BEGINS.sub("", full_answer) if has_open_thought else full_answer.lstrip()).rstrip()

    def _peel(self, text: str) -> tuple[str, int | None]:
        """Strip special tokens and white space from the end of a text.

        Returns:
            The text, and the position after the special token that ends the turn, or None without such a token. It is
            the first trailing token that ends a text, or else the first trailing token: ``<|end|>`` in
            ``<|end|><|endoftext|>``.
        """
        stop = len(text.rstrip())
        end = None
        is_end = False
        while True:
            mark = next((mark for mark in self._marks if text.endswith(mark, 0, stop)), None)
            if mark is None:
                return text[:stop], end
            if mark in self._end_marks or not is_end:
                end = stop
                is_end = mark in self._end_marks
            stop -= len(mark)
            while stop and text[stop - 1].isspace():
                stop -= 1


def _label_turns(conversation: Conversation, only_last: bool) -> list[int]:
    """Return the indices of the messages that are labels."""
    last = len(conversation.messages) - 1
    return [n for n, may in enumerate(conversation.learned) if may and (n == last or not only_last)]


def _prefixes(conversation: Conversation, turns: Sequence[int]) -> list[tuple[int, bool]]:
    """Return the prefixes to render: for each label the prompt, and the messages through the answer. Without labels,
    the prompt of the last message.
    """
    prefixes = [prefix for turn in turns for prefix in ((turn, True), (turn + 1, False))]
    return prefixes or [(len(conversation.messages) - 1, True)]


def _text_after_prompt(prompt: str, end: str, last_message: str) -> str | None:
    """Return the text after the prompt in the rendered turn, or None if the prompt is not found.

    Some templates render the context differently when an answer follows, for example a system message or an opened
    thought. Then the part of the prompt from the last message is searched instead.
    """
    if end.startswith(prompt):
        return end[len(prompt) :]
    position = prompt.rfind(last_message.strip()) if last_message.strip() else -1
    if position < 0:
        return None
    ending = prompt[position:]
    at = end.rfind(ending)
    if at >= 0:
        return end[at + len(ending) :]
    unopened = _OPEN_THOUGHT.sub("", ending)
    at = end.rfind(unopened)
    return None if at < 0 or not unopened else _THOUGHT_BEGINS.sub("", end[at + len(unopened) :])


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _ends_with(text: str, content: str) -> bool:
    """Return True if ``text`` ends with ``content``, ignoring white space, which templates trim."""
    return text.endswith(content.strip()) or _squeeze(text).endswith(_squeeze(content))


def _shows(text: str, content: str) -> bool:
    """Return True if ``text`` contains ``content`` verbatim, ignoring white space, or as a JSON string."""
    if content.strip() in text or _squeeze(content) in _squeeze(text):
        return True
    return json.dumps(content, ensure_ascii=False)[1:-1] in text or json.dumps(content)[1:-1] in text


def _shows_calls(text: str, message: Message) -> bool:
    """Return True if a rendered answer contains its text and the names of its tool calls."""
    calls = message["tool_calls"] if isinstance(message["tool_calls"], list) else []
    names = [_name_of(call) for call in calls if isinstance(call, dict)]
    return _shows(text, str(message["content"])) and bool(names) and all(name and name in text for name in names)


def _with_text_arguments(message: Mapping[str, object]) -> Mapping[str, object]:
    calls = []
    for call in message.get("tool_calls") or ():  # type: ignore[attr-defined]
        function = dict(call.get("function", call))
        function["arguments"] = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls} if calls else message


def _name_of(tool: Message) -> str:
    """Return the name of a tool, or of a tool call."""
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def label_error(reason: str, location: str) -> BadRowError:
    reason = f"the labels cannot be found with the model's chat template: {reason}"
    return BadRowError(reason, reason="labels not found with the chat template", location=location, hint=_HINT)
