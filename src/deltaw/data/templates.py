"""Records become tokens, with a mask that says which of them are labels.

There are two renderings: the tokenizer's chat template, and plain text. Labels are found by position: what
precedes an answer is rendered and tokenized alone, as it is when a model is to write the answer, and these
tokens are no labels. No token is masked because of its value. This module does not know files, length limits
or batches.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaw.data.chat_template import asks_for_date, todays_date, with_date
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, Message, reasoning, without_blank_answers
from deltaw.data.pieces import special_tokens
from deltaw.data.rendering import FAULTS, rendered
from deltaw.data.report import BadRowError, Refuse, refuse
from deltaw.errors import UserError
from deltaw.hub.terminators import turn_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Conversations through a chat template: what precedes each answer when it is written, and the answer.
#
# A chat template is arbitrary code, so what it renders is checked: the answer must be there as the row has it,
# after the prompt that a model is given to write it, and so must all that precedes it. Templates that render an
# earlier turn differently once more turns follow are no difficulty, since every answer is taken in the context
# that it is written in. This module knows text; tokens are :mod:`deltaw.data.templates`'s.


# An answer whose text does not matter.
_STAND_IN = "an-answer-of-the-assistant"
_OPEN_THOUGHT = re.compile(r"<think>\s*$")
_THOUGHT_BEGINS = re.compile(r"^\s*<think>\s*")
_HINT = "set data.template: plain to do without the template, data.chat_template to one of your own, or change the row"


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
                what = "the tokenizer has several chat templates and none is the default"
                hint = "name a file with one in data.chat_template, or set data.template: plain"
                raise UserError(what, where="data.template: chat", hint=hint) from error
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
            what = f"the model's chat template does not accept this conversation: {error}"
            hint = "change the conversation, or set data.template: plain"
            raise BadRowError(what, reason="refused by the chat template", where=where, hint=hint) from error

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
            prompt = self.render(conversation.messages[:last], where, generation=True, tools=conversation.tools)
            content = str(conversation.messages[last]["content"])
            answers = [Answer(last, prompt, "", True, False, self.without_marks(content))]
        self.check_context(answers[-1], conversation, where)
        return answers

    def after_answer(self, messages: Sequence[Message], reply: Message, tools: Sequence[Message]) -> str:
        """What follows the end of an answer to ``messages`` when ``reply`` comes next, through what opens the next
        answer.

        Raises:
            BadRowError: the template does not accept the reply there, or does not show it.
        """
        where = "the environment's text"
        answered: Message = {"role": "assistant", "content": _STAND_IN}
        text = self.render([*messages, answered, reply], where, generation=True, tools=tools)
        _, found, rest = text.rpartition(_STAND_IN)
        if not found or not _shows(rest, str(reply["content"])):
            raise _refused(f"it omits the content of a turn ('{reply['role']}')", where)
        end = next((end for end in self._ends if rest.lstrip().startswith(end)), "")
        return rest.partition(end)[2] if end else rest

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
        marked = any(mark in said for mark in self._marks)
        # A template may also not heed that the prompt for an answer is asked for.
        if not shown and (marked or self.render(messages[:turn], "", generation=False, tools=tools) == prompt):
            raise _refused(f"it adds text after the answer in turn {turn + 1}", where)
        said = said.rstrip() if end_of_turn is None else said[:end_of_turn]
        return Answer(turn, prompt, said, end_of_turn is not None, True, content)

    def _thinking(self, opened: bool, body: str, message: Message, content: str, turn: int, where: str) -> str | None:
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
    return _shows(text, str(message["content"])) and bool(names) and all(name and name in text for name in names)


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
    what = f"the labels cannot be found with the model's chat template: {what}"
    return BadRowError(what, reason="labels not found with the chat template", where=where, hint=_HINT)


# Plain text instead of a chat template: what the parts of a record are, and which of them are labels.
#
# It knows text; tokens are :mod:`deltaw.data.templates`'s.


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
        before = "".join(f"{message['content']}\n" for message in context)
        parts += [PlainPart(before, False, False), PlainPart(str(message["content"]), True, learned, turn)]
        context = []
    return parts


def _needs_template(what: str, where: str) -> BadRowError:
    hint = "set data.template: chat, or name a template in data.chat_template"
    return BadRowError(f"{what} a chat template", reason="tools without a chat template", where=where, hint=hint)


# The turns of a conversation become as few examples as exactness allows.
#
# A template may render earlier turns differently once more turns follow, for example without their reasoning.
# Each turn is then an example of its own, in the context that it is written in. Turns whose tokens are a prefix
# of a later turn's are learned in that turn's example: no token sees what follows it. It knows tokens alone.


def fewest(turns: Sequence[Sequence[int]]) -> list[list[int]]:
    """The turns, given as all tokens through the end of each, in groups: one example each.

    The tokens of a group's turns are prefixes of those of its last turn. Groups and turns keep their order.
    """
    groups: list[list[int]] = []
    for turn in reversed(range(len(turns))):
        tokens = turns[turn]
        found = next((group for group in groups if turns[group[-1]][: len(tokens)] == tokens), None)
        if found is None:
            groups.append([turn])
        else:
            found.insert(0, turn)
    return groups[::-1]


TemplateName = Literal["auto", "chat", "plain"]
LabelsName = Literal["all-turns", "last"]


@dataclass(frozen=True)
class Encoded:
    """The tokens of a record, or of some turns of it.

    Attributes:
        tokens: token ids, up to the end of the last completion.
        spans: half-open ranges of labels in ``tokens``.
        prompt_length: tokens before the last completion.
        answer: the last completion without end marks; None for plain text.
        turns: of a conversation, for each of ``spans`` its place among the messages.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    prompt_length: int
    answer: str | None
    turns: tuple[int, ...] = ()


class Encoder:
    """Turns records into tokens with one tokenizer and one template.

    Args:
        tokenizer: of the model to be trained.
        template: "chat", "plain", or "auto": chat if the tokenizer has a template.
        labels: "all-turns" makes every answer of the assistant a label, "last" the last one only.
        date: what templates that ask for the current date are told, as 2026-01-31; None for today's.

    Attributes:
        chat, template: the rendering in use, as ``template`` "chat" or "plain".
        leading: the tokens that begin every plain text, such as BOS.

    Raises:
        UserError: "chat" is asked for, and the tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName = "auto",
        labels: LabelsName = "all-turns",
        date: str | None = None,
    ) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            hint = "set data.template: plain, name a file in data.chat_template, or use the instruction-tuned model"
            raise UserError("the model's tokenizer has no chat template", where="data.template: chat", hint=hint)
        self.chat = has_template if template == "auto" else template == "chat"
        self.template = "chat" if self.chat else "plain"
        self.labels = labels
        self._tokenizer = tokenizer
        ends = {*turn_ends(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        special = ends | special_tokens(tokenizer).keys()
        self._special_ids = frozenset(special)
        texts = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special))}
        self.leading = _leading_tokens(tokenizer)
        self._date = date or todays_date()
        marks = tuple(sorted(texts - {""}, key=len, reverse=True))
        names = frozenset(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
        self._renderer = ChatRenderer(tokenizer, marks, names, self._date)

    @property
    def dated(self) -> str | None:
        """The date that the template writes into rows; None if it writes none."""
        return self._date if self.chat and asks_for_date(str(self._tokenizer.chat_template)) else None

    @property
    def identity(self) -> str:
        """A hash of what the tokens of a record depend on, besides the tokenizer's vocabulary."""
        parts = [self.template, self.labels, str(self.dated), repr(self.leading), str(self._special_ids)]
        parts.append(repr(self._tokenizer.chat_template) if self.chat else "")
        parts.append(str(self._tokenizer.eos_token_id))
        return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()

    def encode(
        self, records: Sequence[Record | None], places: Sequence[str], on_bad: Refuse = refuse
    ) -> list[list[Encoded]]:
        """Encode records; ``places`` says where each of them is, for messages.

        Returns:
            for each record its tokens, in order: several if the template renders earlier turns differently
            once more turns follow, none for a record that is None or that ``on_bad`` was told of.

        Raises:
            BadRowError: the template does not render a record, or its labels cannot be found.
        """
        drafts: dict[int, tuple[Conversation, list[Answer]]] = {}
        parts: dict[int, list[PlainPart]] = {}
        for index, (record, where) in enumerate(zip(records, places, strict=True)):
            try:
                if isinstance(record, Pair) and self.chat:
                    record = record.conversation()
                if isinstance(record, Conversation) and self.chat:
                    record = without_blank_answers(record)
                    drafts[index] = record, self._renderer.answers(record, where, only_last=self.labels == "last")
                elif record is not None:
                    parts[index] = plain_parts(record, where)
            except BadRowError as error:
                on_bad(index, error)
        # Each answer is tokenized twice: its prompt alone, and with the prompt.
        texts = [text for _, found in drafts.values() for a in found for text in (a.prompt, a.prompt + a.said)]
        texts += [part.text for found in parts.values() for part in found]
        tokens = iter(self._tokenize(texts))
        encoded: list[list[Encoded]] = [[] for _ in records]
        for index, (conversation, answers) in drafts.items():
            rendered = [(next(tokens), next(tokens)) for _ in answers]
            try:
                encoded[index] = self._finish(conversation, answers, rendered, places[index])
            except BadRowError as error:
                on_bad(index, error)
        for index, found in parts.items():
            encoded[index] = [self._join(found, [next(tokens) for _ in found], records[index])]
        return encoded

    def prompt(self, prompt: str | Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """The tokens of ``prompt``, rendered as in training, for a model to answer.

        Args:
            tools: that the model may call; a chat template writes them, plain text has no place for them.
        """
        if self.chat:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            return self._tokenize([self._renderer.render(prompt, "the prompt", generation=True, tools=tools)])[0]
        if isinstance(prompt, str):
            return self._with_leading(self._tokenize([prompt])[0])
        # With some answer at the end, the messages are a row; what precedes that answer is the prompt.
        messages: tuple[Message, ...] = (*prompt, {"role": "assistant", "content": "a"})
        parts = plain_parts(Conversation(messages, (False,) * len(messages)), "the prompt")
        row = self._join(parts, self._tokenize([part.text for part in parts]), None)
        return row.tokens[: row.prompt_length]

    def after_answer(self, messages: Sequence[Message], reply: Message, tools: Sequence[Message] = ()) -> list[int]:
        """The tokens between the end token of an answer to ``messages`` and the next answer, with ``reply`` in them.

        Raises:
            BadRowError: the template does not accept the reply there, or does not show it.
        """
        text = self._renderer.after_answer(messages, reply, tools) if self.chat else f"{reply['content']}\n"
        return self._tokenize([text])[0]

    def without_marks(self, answer: str) -> str:
        """An answer without the special tokens that close it."""
        return self._renderer.without_marks(answer)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        tokenizer = self._tokenizer
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _finish(
        self, conversation: Conversation, answers: list[Answer], tokens: list[tuple[list[int], list[int]]], where: str
    ) -> list[Encoded]:
        """Divide the answers among as few examples as their contexts allow, and check them.

        Args:
            tokens: of each answer those of its prompt, and of both together.
        """
        prompts = [prompt for prompt, _ in tokens]
        wholes = [self._with_prompt(answer, *both, where) for answer, both in zip(answers, tokens, strict=True)]
        found: list[Encoded] = []
        for group in fewest(wholes):
            last = answers[group[-1]]
            if last is not answers[-1]:
                self._renderer.check_context(last, conversation, where)
            learned = [n for n in group if answers[n].learned]
            spans = [(len(prompts[n]), len(wholes[n])) for n in learned]
            turns = tuple(answers[n].turn for n in learned)
            found.append(Encoded(wholes[group[-1]], spans, len(prompts[group[-1]]), last.text, turns))
        return found

    def _with_prompt(self, answer: Answer, prompt: list[int], whole: list[int], where: str) -> list[int]:
        """The tokens of a prompt and its answer, through the end of the turn.

        The prompt's tokens are those of the prompt alone: that is what the model will be given.
        """
        if whole[: len(prompt)] != prompt:
            told = self._text(whole)
            whole = prompt + self._tokenize([answer.said])[0]
            if self._text(whole) != told:
                raise _refused(f"the tokens of the prompt change when turn {answer.turn + 1} follows", where)
        if not answer.ended:
            return self._with_eos(whole)
        if answer.said and whole[-1] not in self._special_ids:
            raise _refused(f"the end of turn {answer.turn + 1} is not found in the tokens", where)
        return whole

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    def _join(self, parts: list[PlainPart], tokens: list[list[int]], record: Record | None) -> Encoded:
        joined: list[int] = []
        spans: list[tuple[int, int]] = []
        turns: list[int] = []
        prompt_length = 0
        for number, (part, ids) in enumerate(zip(parts, tokens, strict=True)):
            if number == 0:
                ids = self._with_leading(ids)
            start = len(joined)
            joined += self._with_eos(ids) if part.completion else ids
            if not part.completion:
                continue
            prompt_length = start
            if part.learned and (number == len(parts) - 1 or self.labels == "all-turns"):
                # Nothing precedes the first token, so it is never predicted.
                spans.append((max(start, 1), len(joined)))
                turns += [] if part.turn is None else [part.turn]
        if record is None:
            return Encoded(joined, spans, prompt_length, None)
        if isinstance(record, Text):
            return Encoded(joined, spans, 0, None)
        answer = record.completion if isinstance(record, Pair) else str(record.messages[-1]["content"])
        return Encoded(joined, spans, prompt_length, self.without_marks(answer), tuple(turns))

    def _with_leading(self, tokens: list[int]) -> list[int]:
        """With the tokens that the tokenizer adds before any text, such as BOS, once."""
        return tokens if tokens[: len(self.leading)] == self.leading else self.leading + tokens

    def _with_eos(self, tokens: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer adds before a text, found by tokenizing one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    starts = range(len(marked) - len(bare) + 1)
    return next((list(marked[:start]) for start in starts if marked[start : start + len(bare)] == bare), [])
