"""Records become tokens, with a mask that says which of them are labels.

There are two renderings: the tokenizer's chat template, and plain text. A chat template is arbitrary code, so
its output is checked. For every answer that is a label, the prompt rendered alone must be a prefix of the
whole, in text and in tokens, and the answer must be where the mask says. Otherwise the row is refused. Labels
are found by position; no token is masked because of its value. This module does not know files, length limits
or batches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import jinja2

from deltaw.data.formats import Conversation, Message, Pair, Record, Text, without_blank_answers
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateName = Literal["auto", "chat", "plain"]
LabelsName = Literal["all-turns", "last"]
_REFUSED_HINT = (
    "set data.labels: last to train on the last answer only, set data.template: plain to do without the "
    "template, or correct it"
)


@dataclass(frozen=True)
class Encoded:
    """A record's tokens.

    Attributes:
        tokens: token ids, up to the end of the last completion.
        spans: half-open ranges of labels in ``tokens``.
        prompt_length: tokens before the last completion.
        answer: the last completion without end marks; None for plain text.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]
    prompt_length: int
    answer: str | None


@dataclass(frozen=True)
class _Draft:
    """A conversation with the renderings that are needed to find its labels."""

    conversation: Conversation
    turns: list[int]
    prompts: list[str]
    ends: list[str]
    where: str

    @property
    def texts(self) -> list[str]:
        """Prompts and ends, alternating; the last end is the whole conversation."""
        return [text for pair in zip(self.prompts, self.ends, strict=True) for text in pair]


class Encoder:
    """Turns records into tokens with one tokenizer and one template.

    Args:
        tokenizer: of the model to be trained.
        template: "chat", "plain", or "auto": chat if the tokenizer has a template.
        labels: "all-turns" makes every answer of the assistant a label, "last" the last one only.

    Raises:
        UserError: "chat" is asked for, and the tokenizer has no template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateName = "auto",
        labels: LabelsName = "all-turns",
    ) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if template == "chat" and not has_template:
            raise UserError(
                "the model's tokenizer has no chat template",
                where="data.template: chat",
                hint="set data.template: plain, or use the instruction-tuned model",
            )
        self.chat = has_template if template == "auto" else template == "chat"
        self.labels = labels
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special} | set(
            tokenizer.all_special_ids
        )
        self._special_ids = frozenset(special)
        texts = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special))}
        self._special_texts = tuple(sorted(texts - {""}, key=len, reverse=True))
        self._leading = _leading_tokens(tokenizer)

    @property
    def template(self) -> str:
        """The rendering in use, "chat" or "plain"."""
        return "chat" if self.chat else "plain"

    def encode(self, records: Sequence[Record], places: Sequence[str]) -> list[Encoded]:
        """Encode records; ``places`` says where each of them is, for messages.

        Raises:
            UserError: the template does not render a record, or its labels cannot be found.
        """
        drafts: dict[int, _Draft] = {}
        pieces: dict[int, list[_Piece]] = {}
        for index, (record, where) in enumerate(zip(records, places, strict=True)):
            if isinstance(record, Pair) and self.chat:
                record = record.conversation()
            if isinstance(record, Conversation) and self.chat:
                drafts[index] = self._draft(without_blank_answers(record), where)
            else:
                pieces[index] = _plain_pieces(record, where)
        texts = [text for draft in drafts.values() for text in draft.texts]
        texts += [piece.text for parts in pieces.values() for piece in parts]
        tokens = iter(self._tokenize(texts))
        encoded: dict[int, Encoded] = {}
        for index, draft in drafts.items():
            encoded[index] = self._finish(draft, [next(tokens) for _ in draft.texts])
        for index, parts in pieces.items():
            encoded[index] = self._join(parts, [next(tokens) for _ in parts], records[index])
        return [encoded[index] for index in range(len(records))]

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens of ``prompt``, rendered as in training, for a model to answer."""
        if self.chat:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            return self._tokenize([self._render(prompt, "the prompt", generation=True)])[0]
        text = prompt if isinstance(prompt, str) else _plain_context(prompt)
        return self._with_leading(self._tokenize([text])[0])

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        tokenizer = self._tokenizer
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    # The chat template

    def _render(self, messages: Sequence[Message], where: str, generation: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
                list(messages),  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=generation,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"the model's chat template does not accept this conversation: {error}",
                where=where,
                hint="change the conversation, or set data.template: plain",
            ) from error

    def _draft(self, conversation: Conversation, where: str) -> _Draft:
        """Render prompts and ends, and check the texts."""
        messages = conversation.messages
        last = len(messages) - 1
        learned = [turn for turn in range(last) if conversation.learned[turn] and self.labels == "all-turns"]
        turns = [*learned, last]
        prompts = [self._render(messages[:turn], where, generation=True) for turn in turns]
        ends = [self._render(messages[: turn + 1], where, generation=False) for turn in turns]
        for turn, prompt, end in zip(turns, prompts, ends, strict=True):
            if not end.startswith(prompt):
                raise _refused(
                    f"the prompt before turn {turn + 1} is not a prefix of the rendered turn", where
                )
        for number, message in enumerate(messages, start=1):
            if message["role"] != "assistant" and not _shows(ends[-1], str(message["content"])):
                raise _refused(f"it omits the content of turn {number} ('{message['role']}')", where)
        return _Draft(conversation, turns, prompts, ends, where)

    def _finish(self, draft: _Draft, tokens: list[list[int]]) -> Encoded:
        """Find the labels by the tokens of the renderings, and check the tokens."""
        prompts, ends = tokens[0::2], tokens[1::2]
        whole = ends[-1]
        spans: list[tuple[int, int]] = []
        for k, turn in enumerate(draft.turns):
            start = len(prompts[k])
            through = self._through_end(draft, k, start, ends[k])
            if through[:start] != prompts[k]:
                raise _refused(f"the tokens of the prompt change when turn {turn + 1} follows", draft.where)
            if turn == draft.turns[-1]:
                whole = through
            elif whole[: len(through)] != through:
                raise _refused(f"it renders turn {turn + 1} differently once more turns follow", draft.where)
            if draft.conversation.learned[turn]:
                spans.append((start, len(through)))
        answer = str(draft.conversation.messages[-1]["content"])
        return Encoded(whole, spans, len(prompts[-1]), self._without_marks(answer))

    def _through_end(self, draft: _Draft, k: int, start: int, tokens: list[int]) -> list[int]:
        """The tokens up to the end mark of turn ``draft.turns[k]``, included.

        The end mark is the first of the special tokens that close the turn, with only white space between
        them: ``<|im_end|>`` in ChatML, ``<|end|>`` if a template writes ``<|end|><|endoftext|>``.
        """
        turn = draft.turns[k]
        message = draft.conversation.messages[turn]
        said = draft.ends[k][len(draft.prompts[k]) :]
        body, marks = self._peel(said)
        content = self._peel(str(message["content"]))[0]
        called = bool(message.get("tool_calls"))
        ends_with_answer = _shows_calls(body, message) if called else _ends_with(body, content)
        special = [i for i in range(start, len(tokens)) if tokens[i] in self._special_ids]
        if marks:
            if draft.conversation.learned[turn] and not ends_with_answer:
                raise _refused(f"it changes the answer in turn {turn + 1}", draft.where)
            if marks > len(special):
                raise _refused(f"the end of turn {turn + 1} is not found in the tokens", draft.where)
            return tokens[: special[-marks] + 1]
        if not ends_with_answer and (special or not self._heeds_generation(draft, turn)):
            raise _refused(f"it adds text after the answer in turn {turn + 1}", draft.where)
        tokens = self._tokenize([draft.prompts[k] + said.rstrip()])[0]
        return self._with_eos(tokens) if k == len(draft.turns) - 1 else tokens

    def _heeds_generation(self, draft: _Draft, turn: int) -> bool:
        """Whether the template renders the prompt for an answer only on request."""
        before = self._render(draft.conversation.messages[:turn], draft.where, generation=False)
        return before != draft.prompts[draft.turns.index(turn)]

    def _peel(self, text: str) -> tuple[str, int]:
        """Text without the special tokens that close it, and their number."""
        text, marks = text.rstrip(), 0
        while text.endswith(self._special_texts):
            mark = next(special for special in self._special_texts if text.endswith(special))
            text, marks = text[: -len(mark)].rstrip(), marks + 1
        return text, marks

    def _without_marks(self, answer: str) -> str:
        text, marks = self._peel(answer)
        return text if marks else answer

    # Plain text

    def _join(self, pieces: list[_Piece], tokens: list[list[int]], record: Record) -> Encoded:
        joined: list[int] = []
        spans: list[tuple[int, int]] = []
        prompt_length = 0
        for number, (piece, ids) in enumerate(zip(pieces, tokens, strict=True)):
            if number == 0:
                ids = self._with_leading(ids)
            start = len(joined)
            joined += self._with_eos(ids) if piece.completion else ids
            if not piece.completion:
                continue
            prompt_length = start
            last = number == len(pieces) - 1
            if piece.learned and (last or self.labels == "all-turns"):
                # Nothing precedes the first token, so it is never predicted.
                spans.append((max(start, 1), len(joined)))
        if isinstance(record, Text):
            return Encoded(joined, spans, 0, None)
        answer = record.completion if isinstance(record, Pair) else str(record.messages[-1]["content"])
        return Encoded(joined, spans, prompt_length, self._without_marks(answer))

    def _with_leading(self, tokens: list[int]) -> list[int]:
        """With the tokens that the tokenizer adds before any text, such as BOS, once."""
        return tokens if tokens[: len(self._leading)] == self._leading else self._leading + tokens

    def _with_eos(self, tokens: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


@dataclass(frozen=True)
class _Piece:
    """A piece of plain text that is tokenized on its own."""

    text: str
    completion: bool
    learned: bool


def _plain_pieces(record: Record, where: str) -> list[_Piece]:
    if isinstance(record, Text):
        return [_Piece(record.text, completion=True, learned=bool(record.text.strip()))]
    if isinstance(record, Pair):
        prompt = f"{record.system}\n{record.prompt}" if record.system else record.prompt
        learned = bool(record.completion.strip())
        return [_Piece(prompt, False, False), _Piece(record.completion, True, learned)]
    pieces: list[_Piece] = []
    context: list[Message] = []
    record = without_blank_answers(record)
    for message, learned in zip(record.messages, record.learned, strict=True):
        if message.get("tool_calls"):
            raise UserError("tool calls need a chat template", where=where, hint="set data.template: chat")
        if message["role"] != "assistant":
            context.append(message)
            continue
        pieces.append(_Piece(_plain_context(context), False, False))
        pieces.append(_Piece(str(message["content"]), True, learned))
        context = []
    return pieces


def _plain_context(messages: Sequence[Message]) -> str:
    return "".join(f"{message['content']}\n" for message in messages)


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer adds before a text, found by tokenizing one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(bare) + 1):
        if marked[start : start + len(bare)] == bare:
            return list(marked[:start])
    return []


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
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    names = [str(function.get("name", "")) for function in functions if isinstance(function, dict)]
    return (
        _shows(text, str(message["content"])) and bool(names) and all(name and name in text for name in names)
    )


def _refused(what: str, where: str) -> UserError:
    return UserError(
        f"the labels cannot be found with the model's chat template: {what}", where=where, hint=_REFUSED_HINT
    )
