"""Tokenization of records with a label mask, through the tokenizer's chat template or as plain text.

Labels are located by position: the prompt of each answer is rendered and tokenized separately, as for generation, and
its tokens are not labels. No token is masked because of its value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.bad_rows import BadRowError, OnBadRow, raise_error
from deltaw.data.chat_rendering import AssistantTurn, ChatRenderer, label_error
from deltaw.data.chat_template import asks_for_date, todays_date
from deltaw.data.example import Example, special_tokens
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, Message, unlabel_blank_answers
from deltaw.data.plain_text import TextSpan, plain_parts
from deltaw.data.row_images import (
    MARKER,
    ImagePlacer,
    PlacedImage,
    RowImage,
    count_markers,
    insert_ids,
    insert_texts,
    place_images,
)
from deltaw.errors import UserError
from deltaw.hub.terminators import turn_ends
from deltaw.settings.data import LabelsName, TemplateName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    def example(self, number: int) -> Example:
        """Return the example of row ``number``."""
        tokens = np.asarray(self.tokens, dtype=np.int32)
        is_label = np.zeros(len(tokens), dtype=bool)
        for start, end in self.spans:
            is_label[start:end] = True
        return Example(number, tokens, is_label, min(self.prompt_length, len(tokens)), self.answer)


class Encoder:
    """Converts records to tokens with one tokenizer and template.

    Args:
        tokenizer: Tokenizer of the model.
        template: "chat", "plain", or "auto" to use the chat template if the tokenizer has one.
        labels: "all-turns" to train on all assistant turns, "last" to train on the last one.
        date: Current date for templates that use it, for example 2026-01-31. The default is today.
        images: Returns the text and the token ids of images. Without it, images are rejected.

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
                raise label_error(f"the tokens of the prompt change when turn {answer.turn + 1} follows", location)
        if not answer.has_end_token:
            return self._with_eos(sequence)
        if answer.completion and sequence[-1] not in self._special_ids:
            raise label_error(f"the end of turn {answer.turn + 1} is not found in the tokens", location)
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
