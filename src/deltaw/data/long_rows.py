"""Rows that are longer than ``data.max_length`` are divided, and every label stays a label, once.

A conversation is divided between turns: each piece is a conversation that begins with the system message and
a question. A turn that is too long on its own, and all plain text, is divided between tokens. It knows
records and their tokens; not files and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deltaw.data.formats import Pair, Record, Text
from deltaw.data.messages import Conversation, without_blank_answers
from deltaw.data.templates import Encoded, Encoder

# The share of a piece that is at least context, where an answer is divided.
_CONTEXT = 0.25


def split_long(
    record: Record, encoded: Sequence[Encoded], encoder: Encoder, limit: int, where: str
) -> list[Encoded]:
    """A record whose tokens, ``encoded``, are more than ``limit``, as pieces that have labels.

    Raises:
        BadRowError: the template does not render a part of the conversation.
    """
    if isinstance(record, Pair) and encoder.chat:
        record = record.conversation()
    if isinstance(record, Conversation):
        return _split_conversation(record, encoder, limit, where)
    filled = not isinstance(record, Text)
    return [piece for row in encoded for piece in windows(row, limit, encoder.leading, filled=filled)]


def windows(row: Encoded, limit: int, leading: Sequence[int], *, filled: bool) -> list[Encoded]:
    """Pieces of at most ``limit`` tokens that follow one another, without those that have no label.

    A later piece begins with ``leading`` (such as BOS) and the token before its first label, which is context
    and no label; ``filled``, with so many of the tokens before that it is full, at least a quarter of it.
    """
    found: list[Encoded] = []
    lead = [*leading] if list(row.tokens[: len(leading)]) == list(leading) else []
    room = limit - len(lead)
    if room < 2:
        lead, room = [], limit
    context = max(1, int(room * _CONTEXT)) if filled else 1
    position = min((start for start, _ in row.spans), default=len(row.tokens))
    while position < len(row.tokens):
        if position < limit and not found:
            begin, stop = 0, min(limit, len(row.tokens))
        else:
            stop = min(len(row.tokens), position + room - context)
            begin = max(0, stop - room) if filled else position - context
        before = lead if begin else []
        shift = len(before) - begin
        spans = [(max(a, position) + shift, min(b, stop) + shift) for a, b in row.spans]
        spans = [(a, b) for a, b in spans if a < b]
        tokens = [*before, *row.tokens[begin:stop]]
        if begin == 0:
            found.append(replace(row, tokens=tokens, spans=spans, prompt_length=min(row.prompt_length, stop)))
        else:
            found.append(Encoded(tokens, spans, 0, None))
        position = min((max(a, stop) for a, b in row.spans if b > stop), default=len(row.tokens))
    return found


def _split_conversation(
    conversation: Conversation, encoder: Encoder, limit: int, where: str
) -> list[Encoded]:
    """Pieces that end with an answer. A later piece begins with the system message, the tools, and the
    question before its first answer."""
    roles = [message["role"] for message in conversation.messages]
    opening = next((n for n, role in enumerate(roles) if role != "system"), 0)
    pending = [n for n, may in enumerate(without_blank_answers(conversation).learned) if may]
    pending = [n for n in pending if encoder.labels == "all-turns" or n == len(roles) - 1]
    found: list[Encoded] = []
    first = opening
    while pending:
        part = _Part(conversation, opening, first, pending)
        pieces = part.fitting(encoder, limit, where)
        question = max((n for n in range(opening, pending[0]) if roles[n] == "user"), default=opening)
        if pending[0] not in part.turns_of(pieces) and first < question:
            first = question
            continue
        if pending[0] not in part.turns_of(pieces):
            alone = _Part(conversation, opening, first, pending[:1])
            rows = encoder.encode([alone.conversation], [where])[0]
            pieces = [piece for row in rows for piece in windows(row, limit, encoder.leading, filled=True)]
            part = alone
            done = set(pending[:1])
        else:
            done = part.turns_of(pieces)
        found += pieces
        pending = [turn for turn in pending if turn not in done]
        if pending:
            first = max((n for n in range(opening, pending[0]) if roles[n] == "user"), default=opening)
    return found


class _Part:
    """The opening of a conversation and its turns from ``first`` through the last of ``learned``."""

    def __init__(self, whole: Conversation, opening: int, first: int, learned: Sequence[int]) -> None:
        self._numbers = [*range(opening), *range(first, learned[-1] + 1)]
        self.conversation = replace(
            whole,
            messages=tuple(whole.messages[n] for n in self._numbers),
            learned=tuple(n in learned for n in self._numbers),
        )

    def fitting(self, encoder: Encoder, limit: int, where: str) -> list[Encoded]:
        """Its examples, each through the last answer that ends within ``limit`` tokens."""
        pieces = []
        for row in encoder.encode([self.conversation], [where])[0]:
            kept = sum(stop <= limit for _, stop in row.spans)
            if kept:
                start, stop = row.spans[kept - 1]
                content = str(self.conversation.messages[row.turns[kept - 1]]["content"])
                pieces.append(
                    Encoded(
                        row.tokens[:stop],
                        row.spans[:kept],
                        start,
                        encoder.without_marks(content),
                        row.turns[:kept],
                    )
                )
        return pieces

    def turns_of(self, pieces: Sequence[Encoded]) -> set[int]:
        """The places in the whole conversation of the turns that are learned in ``pieces``."""
        return {self._numbers[turn] for piece in pieces for turn in piece.turns}
