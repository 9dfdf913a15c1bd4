"""Tokenization of records with a label mask, through the tokenizer's chat template or as plain text.

Labels are located by position: the prompt of each answer is rendered and tokenized separately, as for generation, and
its tokens are not labels. No token is masked because of its value.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltaw.data.chat_template import asks_for_date, todays_date, with_date
from deltaw.data.example import special_tokens
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, Message, reasoning, unlabel_blank_answers
from deltaw.data.rendering import (
    FAULTS,
    STAND_IN,
    ConversationPrefixes,
    complete_template,
    missing_prefix,
    render_batch,
)
from deltaw.data.report import BadRowError, OnBadRow, raise_error
from deltaw.data.row_images import (
    MARKER,
    ImagePlacer,
    PlacedImage,
    RowImage,
    count_markers,
    for_template,
    insert_ids,
    insert_texts,
    place_images,
)
from deltaw.errors import UserError
from deltaw.hub.terminators import turn_ends
from deltaw.settings.data import LabelsName, TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Rendering of conversations.
#
# A chat template is arbitrary code, so that its output is checked: the prompt must contain all context, and the answer
# must follow it unchanged. Each answer is rendered in the context in which it is generated, because some templates
# render earlier turns differently when more turns follow.

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
            raise _label_error(f"it omits the content of a turn ('{reply['role']}')", location)
        end = next((end for end in self._end_marks if rest.lstrip().startswith(end)), "")
        return rest.partition(end)[2] if end else rest

    def check_context(self, answer: AssistantTurn, conversation: Conversation, location: str) -> None:
        """Raise a BadRowError if the prompt of ``answer`` omits a tool, or a message of another role."""
        for number, message in enumerate(conversation.messages[: answer.turn], start=1):
            texts = self._texts_of(message)
            if message["role"] != "assistant" and not all(_shows(answer.prompt, text) for text in texts):
                raise _label_error(f"it omits the content of turn {number} ('{message['role']}')", location)
        for tool in conversation.tools:
            name = _name_of(tool)
            if name and name not in answer.prompt:
                raise _label_error(f"it omits the tool '{name}'", location)

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
            raise _label_error(f"the prompt before turn {turn + 1} is not found in the rendered turn", location)
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
            raise _label_error(f"it changes the answer in turn {turn + 1}", location)
        marked = any(mark in completion for mark in self._marks)
        # Some templates ignore add_generation_prompt.
        if not is_unchanged and (marked or self.render(messages[:turn], "", generation=False, tools=tools) == prompt):
            raise _label_error(f"it adds text after the answer in turn {turn + 1}", location)
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
                raise _label_error(f"it opens a thought, and turn {turn + 1} has no reasoning", location)
            return None
        if "</think>" in body or (thought and _shows(body, thought)):
            if not _shows(body, thought or _THOUGHT_BEGINS.sub("", content).partition("</think>")[0]):
                raise _label_error(f"it changes the reasoning of turn {turn + 1}", location)
            return None
        full_answer = f"<think>\n{thought}\n</think>\n\n{content}" if thought else content
        has_tags = not thought or "</think>" in self.template()
        if message.get("tool_calls") or not has_tags or not _ends_with(full_answer, body):
            raise _label_error(f"it drops the reasoning of turn {turn + 1}", location)
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


def _label_error(reason: str, location: str) -> BadRowError:
    reason = f"the labels cannot be found with the model's chat template: {reason}"
    return BadRowError(reason, reason="labels not found with the chat template", location=location, hint=_HINT)


# Plain text, without a chat template.


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


# Merging of turns into examples. Turns whose tokens are a prefix of a later turn's tokens are trained in the same
# example, which is exact because attention is causal. If the template renders earlier turns differently when more turns
# follow, they become separate examples.


def group_by_prefix(turns: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group turns into examples.

    The tokens of all turns of a group are prefixes of the tokens of its last turn. Groups and turns preserve their
    order.

    Args:
        turns: For each turn, all tokens through its end.
    """
    groups: list[list[int]] = []
    for turn in reversed(range(len(turns))):
        tokens = turns[turn]
        matching_group = next((group for group in groups if turns[group[-1]][: len(tokens)] == tokens), None)
        if matching_group is None:
            groups.append([turn])
        else:
            matching_group.insert(0, turn)
    return groups[::-1]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a record, or of some of its turns.

    Attributes:
        tokens: Token ids through the end of the last completion.
        spans: Half-open ranges of labels in ``tokens``.
        prompt_length: Number of tokens before the last completion.
        answer: Last completion without end marks, or None if the record is plain text.
        turns: For a conversation, the message index of each span.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    prompt_length: int
    answer: str | None
    turns: tuple[int, ...] = ()


class Encoder:
    """Converts records to tokens with one tokenizer and template.

    Args:
        tokenizer: Tokenizer of the model.
        template: "chat", "plain", or "auto" to use the chat template if the tokenizer has one.
        labels: "all-turns" to train on all assistant turns, "last" to train on the last one.
        date: Current date for templates that use it, for example 2026-01-31. The default is today.
        images: Gives images their text and token ids. Without it, images are rejected.

    Attributes:
        chat: True if the chat template is used.
        template: "chat" or "plain".
        leading: Tokens at the start of each plain text, for example BOS.

    Raises:
        UserError: if "chat" is requested and the tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName = "auto",
        labels: LabelsName = "all-turns",
        date: str | None = None,
        images: ImagePlacer | None = None,
    ) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            hint = "set data.template: plain, name a file in data.chat_template, or use the instruction-tuned model"
            raise UserError("the model's tokenizer has no chat template", location="data.template: chat", hint=hint)
        self.chat = has_template if template == "auto" else template == "chat"
        self.template = "chat" if self.chat else "plain"
        self.labels = labels
        self.images = images
        self._tokenizer = tokenizer
        end_ids = {*turn_ends(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        special_ids = end_ids | special_tokens(tokenizer).keys()
        self._special_ids = frozenset(special_ids)
        special_texts = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special_ids))}
        self.leading = _leading_tokens(tokenizer)
        self._date = date or todays_date()
        marks = tuple(sorted(special_texts - {""}, key=len, reverse=True))
        names = frozenset(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(end_ids)))
        self._renderer = ChatRenderer(tokenizer, marks, names, self._date, images)

    @property
    def template_date(self) -> str | None:
        """Return the date that the template writes into rows, or None."""
        return self._date if self.chat and asks_for_date(str(self._tokenizer.chat_template)) else None

    @property
    def added_prefix(self) -> str | None:
        """Return the role header that is added to prompts because the template ignores ``add_generation_prompt``."""
        return self._renderer.added_prefix or None if self.chat else None

    @property
    def identity(self) -> str:
        """Return a hash of everything that affects the tokens of a record, except the tokenizer's vocabulary."""
        parts = [self.template, self.labels, str(self.template_date), repr(self.leading), str(self._special_ids)]
        parts.append(repr(self._tokenizer.chat_template) if self.chat else "")
        parts.append(str(self._tokenizer.eos_token_id))
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()

    def encode(
        self, records: Sequence[Record | None], locations: Sequence[str], on_bad: OnBadRow = raise_error
    ) -> list[list[Encoded]]:
        """Tokenize records.

        Args:
            locations: Location of each record, for messages.
            on_bad: Receives the errors of unusable records.

        Returns:
            The token sequences of each record: several if the template renders earlier turns differently when more
            turns follow, none if the record is None or was passed to ``on_bad``.

        Raises:
            BadRowError: if the template rejects a record, its labels cannot be located, or an image is unusable.
        """
        conversations: dict[int, Conversation] = {}
        parts: dict[int, list[TextSpan]] = {}
        for index, (record, location) in enumerate(zip(records, locations, strict=True)):
            if isinstance(record, Pair) and self.chat:
                record = record.conversation()
            if isinstance(record, Conversation) and self.chat:
                conversations[index] = unlabel_blank_answers(record)
            elif record is not None:
                try:
                    parts[index] = plain_parts(record, location)
                except BadRowError as error:
                    on_bad(index, error)
        drafts = self._renderer.answers(conversations, locations, on_bad, only_last=self.labels == "last")
        placed = self._place_images(conversations, drafts, records, parts, locations, on_bad)
        # Tokenize each prompt twice, without and with its answer.
        texts = [text for items in drafts.values() for a in items for text in (a.prompt, a.prompt + a.completion)]
        texts += [part.text for items in parts.values() for part in items]
        tokens = iter(self._tokenize(texts))
        encoded: list[list[Encoded]] = [[] for _ in records]
        for index, answers in drafts.items():
            token_pairs = [(next(tokens), next(tokens)) for _ in answers]
            try:
                encoded[index] = self._finish(
                    conversations[index], answers, token_pairs, placed.get(index, []), locations[index]
                )
            except BadRowError as error:
                on_bad(index, error)
        for index, items in parts.items():
            row = self._join(items, [next(tokens) for _ in items], records[index])
            try:
                encoded[index] = [self._with_image_ids(row, placed.get(index, []), locations[index])]
            except BadRowError as error:
                on_bad(index, error)
        return encoded

    def prompt(
        self, prompt: str | Sequence[Message], tools: Sequence[Message] = (), images: Sequence[RowImage] = ()
    ) -> list[int]:
        """Return the tokens of a prompt, rendered as in training.

        Args:
            tools: Tools that the model may call. Ignored for plain text.
            images: Images that the messages refer to (:func:`deltaw.data.row_images.take_images`).

        Raises:
            BadRowError: if an image cannot be read, or a text contains an image token.
        """
        location = "the prompt"
        placed = [] if self.images is None else place_images(self.images, images, location)
        if self.chat:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            text = self._renderer.render(prompt, location, generation=True, tools=tools)
            if self.images is not None:
                text = insert_texts(text, self.images.placeholder, placed, location)
            row = Encoded(self._tokenize([text])[0], [], 0, None)
        elif isinstance(prompt, str):
            text = prompt if self.images is None else insert_texts(prompt, MARKER, placed, location)
            row = Encoded(self._with_leading(self._tokenize([text])[0]), [], 0, None)
        else:
            # Render a row with a placeholder answer, and return the part before the answer.
            messages: tuple[Message, ...] = (*prompt, {"role": "assistant", "content": "a"})
            parts = plain_parts(Conversation(messages, (False,) * len(messages)), location)
            parts = self._with_image_texts(parts, placed, location)
            row = self._join(parts, self._tokenize([part.text for part in parts]), None)
            row = replace(row, tokens=row.tokens[: row.prompt_length])
        return self._with_image_ids(row, placed, location).tokens

    def _place_images(
        self,
        conversations: Mapping[int, Conversation],
        drafts: dict[int, list[AssistantTurn]],
        records: Sequence[Record | None],
        parts: dict[int, list[TextSpan]],
        locations: Sequence[str],
        on_bad: OnBadRow,
    ) -> dict[int, list[PlacedImage]]:
        """Return the images of each record, and insert their texts into its prompts.

        Records with an unusable image are passed to ``on_bad`` and removed.
        """
        placed: dict[int, list[PlacedImage]] = {}
        if (placer := self.images) is None:
            return placed
        for index in sorted([*drafts, *parts]):
            location = locations[index]
            try:
                placed[index] = images = place_images(placer, getattr(records[index], "images", ()), location)
                if index in parts:
                    parts[index] = self._with_image_texts(parts[index], images, location)
                    continue
                counts = [count_markers(conversations[index].messages[: answer.turn]) for answer in drafts[index]]
                drafts[index] = [
                    replace(a, prompt=insert_texts(a.prompt, placer.placeholder, images[:count], location))
                    for a, count in zip(drafts[index], counts, strict=True)
                ]
            except BadRowError as error:
                for remaining in (drafts, parts):
                    remaining.pop(index, None)
                on_bad(index, error)
        return placed

    def _with_image_texts(self, parts: list[TextSpan], images: Sequence[PlacedImage], location: str) -> list[TextSpan]:
        """Replace the markers in plain text, except for answers."""
        if self.images is None:
            return parts
        filled: list[TextSpan] = []
        for part in parts:
            count = 0 if part.completion else part.text.count(MARKER)
            if count:
                part = replace(part, text=insert_texts(part.text, MARKER, images[:count], location))
                images = images[count:]
            filled.append(part)
        return filled

    def _with_image_ids(self, row: Encoded, images: Sequence[PlacedImage], location: str) -> Encoded:
        if self.images is None:
            return row
        return replace(row, tokens=insert_ids(row.tokens, row.spans, images, self.images, location))

    def encode_reply(self, messages: Sequence[Message], reply: Message, tools: Sequence[Message] = ()) -> list[int]:
        """Return the tokens between the end token of an answer to ``messages`` and the next answer, with ``reply`` in
        them.

        Raises:
            BadRowError: if the template does not accept the reply, or omits it.
        """
        text = self._renderer.render_reply(messages, reply, tools) if self.chat else f"{reply['content']}\n"
        row = Encoded(self._tokenize([text])[0], [], 0, None)
        return self._with_image_ids(row, [], "the environment's text").tokens

    def strip_end_marks(self, answer: str) -> str:
        """Remove the special tokens at the end of an answer."""
        return self._renderer.strip_end_marks(answer)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _finish(
        self,
        conversation: Conversation,
        answers: list[AssistantTurn],
        tokens: list[tuple[list[int], list[int]]],
        images: Sequence[PlacedImage],
        location: str,
    ) -> list[Encoded]:
        """Merge the answers into examples and check their contexts.

        Args:
            tokens: For each answer, the tokens of its prompt, and of prompt and answer together.
            images: Images of the conversation.
        """
        prompts = [prompt for prompt, _ in tokens]
        sequences = [self._with_prompt(answer, *pair, location) for answer, pair in zip(answers, tokens, strict=True)]
        encoded: list[Encoded] = []
        for group in group_by_prefix(sequences):
            last = answers[group[-1]]
            if last is not answers[-1]:
                self._renderer.check_context(last, conversation, location)
            trained = [n for n in group if answers[n].learned]
            spans = [(len(prompts[n]), len(sequences[n])) for n in trained]
            turns = tuple(answers[n].turn for n in trained)
            row = Encoded(sequences[group[-1]], spans, len(prompts[group[-1]]), last.text, turns)
            count = count_markers(conversation.messages[: last.turn]) if images else 0
            encoded.append(self._with_image_ids(row, images[:count], location))
        return encoded

    def _with_prompt(self, answer: AssistantTurn, prompt: list[int], sequence: list[int], location: str) -> list[int]:
        """Return the tokens of a prompt and its answer through the end of the turn.

        The prompt is tokenized separately, as for generation.

        Args:
            prompt: Tokens of the prompt.
            sequence: Tokens of prompt and answer, tokenized together.
        """
        if sequence[: len(prompt)] != prompt:
            text = self._text(sequence)
            sequence = prompt + self._tokenize([answer.completion])[0]
            if self._text(sequence) != text:
                raise _label_error(f"the tokens of the prompt change when turn {answer.turn + 1} follows", location)
        if not answer.has_end_token:
            return self._with_eos(sequence)
        if answer.completion and sequence[-1] not in self._special_ids:
            raise _label_error(f"the end of turn {answer.turn + 1} is not found in the tokens", location)
        return sequence

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _join(self, parts: list[TextSpan], tokens: list[list[int]], record: Record | None) -> Encoded:
        sequence: list[int] = []
        spans: list[tuple[int, int]] = []
        turns: list[int] = []
        prompt_length = 0
        for number, (part, ids) in enumerate(zip(parts, tokens, strict=True)):
            if number == 0:
                ids = self._with_leading(ids)
            start = len(sequence)
            sequence += self._with_eos(ids) if part.completion else ids
            if not part.completion:
                continue
            prompt_length = start
            if part.learned and (number == len(parts) - 1 or self.labels == "all-turns"):
                # The first token has no preceding token and is never predicted.
                spans.append((max(start, 1), len(sequence)))
                turns += [] if part.turn is None else [part.turn]
        if record is None:
            return Encoded(sequence, spans, prompt_length, None)
        if isinstance(record, Text):
            return Encoded(sequence, spans, 0, None)
        answer = record.completion if isinstance(record, Pair) else str(record.messages[-1]["content"])
        return Encoded(sequence, spans, prompt_length, self.strip_end_marks(answer), tuple(turns))

    def _with_leading(self, tokens: list[int]) -> list[int]:
        """Prepend the tokens that the tokenizer adds to every text, for example BOS, unless they are present."""
        return tokens if tokens[: len(self.leading)] == self.leading else self.leading + tokens

    def _with_eos(self, tokens: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer adds before a text."""
    without_special = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a")["input_ids"]
    length = len(without_special)
    starts = range(len(with_special) - length + 1)
    matches = (start for start in starts if with_special[start : start + length] == without_special)
    return list(with_special[: next(matches, 0)])
