"""Rows longer than ``data.max_length``: rejected, truncated, dropped, or divided.

Every label of a divided row occurs in exactly one part. Conversations are divided between turns, and each part starts
with the system message and a question. Single turns that are too long, and plain text, are divided between tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltaw.data.example import Example
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, unlabel_blank_answers
from deltaw.data.report import Account
from deltaw.data.row_images import ImagePlacer
from deltaw.data.row_store import key_of
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError
from deltaw.settings.data import DataSettings

# Minimum share of context tokens in a part of a divided answer.
_CONTEXT = 0.25


def split_long(
    record: Record, encoded: Sequence[Encoded], encoder: Encoder, limit: int, location: str
) -> list[Encoded]:
    """Divide a record of more than ``limit`` tokens into parts with labels.

    Args:
        encoded: Tokens of the record.

    Raises:
        BadRowError: if the template rejects a part of the conversation.
    """
    if isinstance(record, Pair) and encoder.chat:
        record = record.conversation()
    if isinstance(record, Conversation):
        return _split_conversation(record, encoder, limit, location)
    maximize_context = not isinstance(record, Text)
    return [
        piece
        for row in encoded
        for piece in split_tokens(row, limit, encoder.leading, maximize_context=maximize_context)
    ]


def split_tokens(row: Encoded, limit: int, leading: Sequence[int], *, maximize_context: bool) -> list[Encoded]:
    """Divide a token sequence into consecutive parts of at most ``limit`` tokens, without those that have no label.

    Later parts start with ``leading`` (such as BOS) and at least one unlabeled context token.

    Args:
        maximize_context: Use as many context tokens as fit, and at least a quarter of the part.
    """
    parts: list[Encoded] = []
    leading_tokens = [*leading] if list(row.tokens[: len(leading)]) == list(leading) else []
    capacity = limit - len(leading_tokens)
    if capacity < 2:
        leading_tokens = []
        capacity = limit
    context = max(1, int(capacity * _CONTEXT)) if maximize_context else 1
    position = min((start for start, _ in row.spans), default=len(row.tokens))
    while position < len(row.tokens):
        if position < limit and not parts:
            first = 0
            stop = min(limit, len(row.tokens))
        else:
            stop = min(len(row.tokens), position + capacity - context)
            first = max(0, stop - capacity) if maximize_context else position - context
        prefix = leading_tokens if first else []
        shift = len(prefix) - first
        spans = [(max(a, position) + shift, min(b, stop) + shift) for a, b in row.spans]
        spans = [(a, b) for a, b in spans if a < b]
        tokens = [*prefix, *row.tokens[first:stop]]
        if first == 0:
            parts.append(replace(row, tokens=tokens, spans=spans, prompt_length=min(row.prompt_length, stop)))
        else:
            parts.append(Encoded(tokens, spans, 0, None))
        position = min((max(a, stop) for a, b in row.spans if b > stop), default=len(row.tokens))
    return parts


def _split_conversation(conversation: Conversation, encoder: Encoder, limit: int, location: str) -> list[Encoded]:
    """Divide a conversation into parts that end with an answer.

    Later parts start with the system message, the tools, and the question before their first answer.
    """
    roles = [message["role"] for message in conversation.messages]
    num_opening_messages = next((n for n, role in enumerate(roles) if role != "system"), 0)
    pending = [n for n, has_labels in enumerate(unlabel_blank_answers(conversation).learned) if has_labels]
    pending = [n for n in pending if encoder.labels == "all-turns" or n == len(roles) - 1]
    encoded: list[Encoded] = []
    first = num_opening_messages
    while pending:
        part = _ConversationPart(conversation, num_opening_messages, first, pending)
        pieces = part.encode_fitting(encoder, limit, location)
        finished = part.label_turns(pieces)
        question = max(
            (n for n in range(num_opening_messages, pending[0]) if roles[n] == "user"), default=num_opening_messages
        )
        if pending[0] not in finished:
            if first < question:
                first = question
                continue
            part = _ConversationPart(conversation, num_opening_messages, first, pending[:1])
            rows = encoder.encode([part.conversation], [location])[0]
            pieces = [
                piece for row in rows for piece in split_tokens(row, limit, encoder.leading, maximize_context=True)
            ]
            finished = set(pending[:1])
        encoded += pieces
        pending = [turn for turn in pending if turn not in finished]
        first = max(
            (n for n in range(num_opening_messages, min(pending, default=0)) if roles[n] == "user"),
            default=num_opening_messages,
        )
    return encoded


class _ConversationPart:
    """Part of a conversation: its opening messages, and its turns from ``first`` through the last of ``trained``."""

    def __init__(
        self, conversation: Conversation, num_opening_messages: int, first: int, trained: Sequence[int]
    ) -> None:
        self._numbers = [*range(num_opening_messages), *range(first, trained[-1] + 1)]
        messages = (conversation.messages[n] for n in self._numbers)
        learned = (n in trained for n in self._numbers)
        self.conversation = replace(conversation, messages=tuple(messages), learned=tuple(learned))

    def encode_fitting(self, encoder: Encoder, limit: int, location: str) -> list[Encoded]:
        """Return its examples, each through the last answer that ends within ``limit`` tokens."""
        pieces = []
        for row in encoder.encode([self.conversation], [location])[0]:
            num_answers = sum(stop <= limit for _, stop in row.spans)
            if num_answers:
                start, stop = row.spans[num_answers - 1]
                answer = encoder.strip_end_marks(str(self.conversation.messages[row.turns[num_answers - 1]]["content"]))
                spans = row.spans[:num_answers]
                turns = row.turns[:num_answers]
                pieces.append(Encoded(row.tokens[:stop], spans, start, answer, turns))
        return pieces

    def label_turns(self, pieces: Sequence[Encoded]) -> set[int]:
        """Return the indices, in the original conversation, of the turns that are labels in ``pieces``."""
        return {self._numbers[turn] for piece in pieces for turn in piece.turns}


@dataclass
class LongRows:
    """Rows that exceed the length limit while ``data.long_rows`` is "error".

    Attributes:
        count: Number of rows.
        first: Location of the first row.
        tokens: Number of tokens of the first row.
        longest: Number of tokens of the longest row.
    """

    count: int = 0
    first: str = ""
    tokens: int = 0
    longest: int = 0

    def add(self, later: LongRows) -> None:
        """Add the counts of later rows."""
        if not self.count:
            self.first = later.first
            self.tokens = later.tokens
        self.count += later.count
        self.longest = max(self.longest, later.longest)

    def error(self, limit: int, *, can_split: bool = True) -> UserError:
        """Return the error for these rows."""
        subject = f"{self.count:,} rows are" if self.count > 1 else "1 row is"
        policies = "cut (truncate), drop, or split" if can_split else "cut (truncate) or drop"
        message = f"{subject} longer than {limit:,} tokens; the first has {self.tokens:,}"
        hint = f"set data.max_length: {self.longest} to fit all, or data.long_rows: {policies}"
        return UserError(message, location=self.first, hint=hint)


def would_split_image(tokens: Sequence[int] | np.ndarray, settings: DataSettings, images: ImagePlacer | None) -> bool:
    """Return True if ``data.long_rows`` would divide a row with images, which is dropped instead.

    A row can be cut after its last image. It is never split, because the parts would need images of earlier turns.
    """
    limit = settings.max_length
    if images is None or len(tokens) <= limit or settings.long_rows not in ("cut", "split"):
        return False
    return any(token >= images.first_id for token in (tokens if settings.long_rows == "split" else tokens[limit:]))


def limit_length(
    examples: tuple[Example, ...],
    location: str,
    settings: DataSettings,
    account: Account,
    long: LongRows,
    images: ImagePlacer | None = None,
) -> tuple[Example, ...] | None:
    """Return the examples of one row or group, truncated to ``data.max_length``, or None if they are unusable.

    Unusable examples are too long, unlabeled or equal. Truncated and dropped ones are counted in ``account``. With
    ``data.long_rows: error``, long ones are counted in ``long``.
    """
    divided = any(would_split_image(example.tokens, settings, images) for example in examples)
    limit = settings.max_length
    longest = max(map(len, examples))
    labels = sum(example.label_count for example in examples)
    if longest > limit and settings.long_rows == "error":
        long.add(LongRows(1, location, longest, longest))
        return None
    if longest > limit and (divided or settings.long_rows == "drop"):
        account["dropped_long"] += 1
        account["labels_dropped"] += labels
        return None
    truncated = examples
    if longest > limit:
        truncated = tuple(example.truncate(limit) for example in examples)
        account["labels_cut"] += labels - sum(example.label_count for example in truncated)
    if not all(example.label_count for example in truncated) or not all_distinct(truncated):
        account["without_label"] += 1  # or the truncated answers are equal
        return None
    if longest > limit:
        account["cut"] += 1
        account["tokens_cut"] += sum(map(len, examples)) - sum(map(len, truncated))
    return truncated


def all_distinct(examples: tuple[Example, ...]) -> bool:
    """Return True if all examples have different tokens or labels."""
    return len(examples) == 1 or len({key_of(example) for example in examples}) == len(examples)
