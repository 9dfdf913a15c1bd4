"""Records become tokens, with a mask that says which of them are labels.

There are two renderings: the tokenizer's chat template, and plain text. Labels are found by position: what
precedes an answer is rendered and tokenized alone, as it is when a model is to write the answer, and these
tokens are no labels. No token is masked because of its value. This module does not know files, length limits
or batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deltaw.data.bad_rows import BadRowError, Refuse, refuse
from deltaw.data.chat import Answer, ChatRenderer
from deltaw.data.chat_template import asks_for_date, todays_date
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, Message, without_blank_answers
from deltaw.data.plain import PlainPart, plain_parts
from deltaw.data.unroll import fewest
from deltaw.errors import UserError
from deltaw.hub.terminators import turn_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


@dataclass(frozen=True)
class _Draft:
    """A conversation with its answers, each of which is tokenized twice: without and with its prompt."""

    conversation: Conversation
    answers: list[Answer]
    where: str

    @property
    def texts(self) -> list[str]:
        return [text for answer in self.answers for text in (answer.prompt, answer.prompt + answer.said)]


class Encoder:
    """Turns records into tokens with one tokenizer and one template.

    Args:
        tokenizer: of the model to be trained.
        template: "chat", "plain", or "auto": chat if the tokenizer has a template.
        labels: "all-turns" makes every answer of the assistant a label, "last" the last one only.
        date: what templates that ask for the current date are told, as 2026-01-31; None for today's.

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
            raise UserError(
                "the model's tokenizer has no chat template",
                where="data.template: chat",
                hint="set data.template: plain, name a file in data.chat_template, or use the "
                "instruction-tuned model",
            )
        self.chat = has_template if template == "auto" else template == "chat"
        self.labels = labels
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {number for number, token in added.items() if token.special}
        ends = {*turn_ends(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
        special |= {*tokenizer.all_special_ids, *ends}
        self._special_ids = frozenset(special)
        texts = {str(token) for token in tokenizer.convert_ids_to_tokens(sorted(special))}
        self._leading = _leading_tokens(tokenizer)
        self._date = date or todays_date()
        marks = tuple(sorted(texts - {""}, key=len, reverse=True))
        names = frozenset(str(token) for token in tokenizer.convert_ids_to_tokens(sorted(ends)))
        self._renderer = ChatRenderer(tokenizer, marks, names, self._date)

    @property
    def template(self) -> str:
        """The rendering in use, "chat" or "plain"."""
        return "chat" if self.chat else "plain"

    @property
    def leading(self) -> tuple[int, ...]:
        """The tokens that begin every plain text, such as BOS."""
        return tuple(self._leading)

    @property
    def dated(self) -> str | None:
        """The date that the template writes into rows; None if it writes none."""
        return self._date if self.chat and asks_for_date(str(self._tokenizer.chat_template)) else None

    @property
    def identity(self) -> str:
        """A hash of what the tokens of a record depend on, besides the tokenizer's vocabulary."""
        parts = [self.template, self.labels, str(self.dated), repr(self._leading), str(self._special_ids)]
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
        drafts: dict[int, _Draft] = {}
        parts: dict[int, list[PlainPart]] = {}
        for index, (record, where) in enumerate(zip(records, places, strict=True)):
            try:
                if isinstance(record, Pair) and self.chat:
                    record = record.conversation()
                if isinstance(record, Conversation) and self.chat:
                    drafts[index] = self._draft(without_blank_answers(record), where)
                elif record is not None:
                    parts[index] = plain_parts(record, where)
            except BadRowError as error:
                on_bad(index, error)
        texts = [text for draft in drafts.values() for text in draft.texts]
        texts += [part.text for found in parts.values() for part in found]
        tokens = iter(self._tokenize(texts))
        encoded: list[list[Encoded]] = [[] for _ in records]
        for index, draft in drafts.items():
            rendered = [next(tokens) for _ in draft.texts]
            try:
                encoded[index] = self._finish(draft, rendered)
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
            rendered = self._renderer.render(prompt, "the prompt", generation=True, tools=tools)
            return self._tokenize([rendered])[0]
        if isinstance(prompt, str):
            return self._with_leading(self._tokenize([prompt])[0])
        # With some answer at the end, the messages are a row; what precedes that answer is the prompt.
        messages: tuple[Message, ...] = (*prompt, {"role": "assistant", "content": "a"})
        parts = plain_parts(Conversation(messages, (False,) * len(messages)), "the prompt")
        row = self._join(parts, self._tokenize([part.text for part in parts]), None)
        return row.tokens[: row.prompt_length]

    def without_marks(self, answer: str) -> str:
        """An answer without the special tokens that close it."""
        return self._renderer.without_marks(answer)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        tokenizer = self._tokenizer
        return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    # The chat template

    def _draft(self, conversation: Conversation, where: str) -> _Draft:
        answers = self._renderer.answers(conversation, where, only_last=self.labels == "last")
        return _Draft(conversation, answers, where)

    def _finish(self, draft: _Draft, tokens: list[list[int]]) -> list[Encoded]:
        """Divide the answers among as few examples as their contexts allow, and check them."""
        prompts = tokens[0::2]
        wholes = [
            self._with_prompt(draft, answer, prompt, whole)
            for answer, prompt, whole in zip(draft.answers, prompts, tokens[1::2], strict=True)
        ]
        found: list[Encoded] = []
        for group in fewest(wholes):
            last = draft.answers[group[-1]]
            if last is not draft.answers[-1]:
                self._renderer.check_context(last, draft.conversation, draft.where)
            learned = [n for n in group if draft.answers[n].learned]
            spans = [(len(prompts[n]), len(wholes[n])) for n in learned]
            turns = tuple(draft.answers[n].turn for n in learned)
            found.append(Encoded(wholes[group[-1]], spans, len(prompts[group[-1]]), last.text, turns))
        return found

    def _with_prompt(self, draft: _Draft, answer: Answer, prompt: list[int], whole: list[int]) -> list[int]:
        """The tokens of a prompt and its answer, through the end of the turn.

        The prompt's tokens are those of the prompt alone: that is what the model will be given.
        """
        if whole[: len(prompt)] != prompt:
            text = answer.prompt + answer.said
            whole = prompt + self._tokenize([answer.said])[0]
            if self._text(whole) != self._text(self._tokenize([text])[0]):
                what = f"the tokens of the prompt change when turn {answer.turn + 1} follows"
                raise _not_found(what, draft)
        if not answer.ended:
            return self._with_eos(whole)
        if answer.said and whole[-1] not in self._special_ids:
            raise _not_found(f"the end of turn {answer.turn + 1} is not found in the tokens", draft)
        return whole

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))

    # Plain text

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
            last = number == len(parts) - 1
            if part.learned and (last or self.labels == "all-turns"):
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
        return tokens if tokens[: len(self._leading)] == self._leading else self._leading + tokens

    def _with_eos(self, tokens: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return tokens if eos is None or tokens[-1:] == [eos] else [*tokens, eos]


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer adds before a text, found by tokenizing one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    marked = tokenizer("a")["input_ids"]
    for start in range(len(marked) - len(bare) + 1):
        if marked[start : start + len(bare)] == bare:
            return list(marked[:start])
    return []


def _not_found(what: str, draft: _Draft) -> BadRowError:
    return BadRowError(
        f"the labels cannot be found with the model's chat template: {what}",
        reason="labels not found with the chat template",
        where=draft.where,
        hint="set data.template: plain to do without the template, or data.chat_template to one of your own",
    )
