"""Some rows of a source become examples, and every row that becomes none, or several, is counted.

It is given rows in chunks, and knows neither where they come from nor where the examples go.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deltaw.data.example import Example
from deltaw.data.formats import Form, Pair, Record, Text, read_records, system_of, with_system
from deltaw.data.messages import Conversation, without_blank_answers
from deltaw.data.report import BadRowError, BadRows
from deltaw.data.row_store import key_of
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError

# Rows that are longer than ``data.max_length`` are divided, and every label stays a label, once.
#
# A conversation is divided between turns: each piece is a conversation that begins with the system message and
# a question. A turn that is too long on its own, and all plain text, is divided between tokens. It knows
# records and their tokens; not files and batches.


# The share of a piece that is at least context, where an answer is divided.
_CONTEXT = 0.25


def split_long(record: Record, encoded: Sequence[Encoded], encoder: Encoder, limit: int, where: str) -> list[Encoded]:
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


def _split_conversation(conversation: Conversation, encoder: Encoder, limit: int, where: str) -> list[Encoded]:
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
        done = part.turns_of(pieces)
        question = max((n for n in range(opening, pending[0]) if roles[n] == "user"), default=opening)
        if pending[0] not in done:
            if first < question:
                first = question
                continue
            rows = encoder.encode([_Part(conversation, opening, first, pending[:1]).conversation], [where])[0]
            pieces = [piece for row in rows for piece in windows(row, limit, encoder.leading, filled=True)]
            done = set(pending[:1])
        found += pieces
        pending = [turn for turn in pending if turn not in done]
        first = max((n for n in range(opening, min(pending, default=0)) if roles[n] == "user"), default=opening)
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
                answer = encoder.without_marks(str(self.conversation.messages[row.turns[kept - 1]]["content"]))
                pieces.append(Encoded(row.tokens[:stop], row.spans[:kept], start, answer, row.turns[:kept]))
        return pieces

    def turns_of(self, pieces: Sequence[Encoded]) -> set[int]:
        """The places in the whole conversation of the turns that are learned in ``pieces``."""
        return {self._numbers[turn] for piece in pieces for turn in piece.turns}


# What became of rows besides one example each: the counts of :class:`deltaw.data.report.Report`, by their names there.
Account = Counter[str]
# How many rows begin with each system message; "" counts those with none, and those with a rare or very long one.
Systems = Counter[str]
# Rows share a system message if this share of them has it. One with more characters is not kept.
SHARED, MOST_SYSTEM = 0.9, 32_768
# System messages that are counted apart from the rest: each row may have another one.
_SYSTEMS = 8


def count_system(systems: Systems, record: Record) -> None:
    """Count the system message of one row."""
    text = system_of(record)
    systems[text if text.strip() and len(text) <= MOST_SYSTEM else ""] += 1


def frequent(systems: Systems) -> Systems:
    """The system messages that most rows have."""
    kept = Systems(dict(systems.most_common(_SYSTEMS)))
    kept[""] += systems.total() - kept.total()
    return kept


def shared_system(systems: Systems) -> dict[str, Any]:
    """``system`` and ``system_rows`` of :class:`deltaw.data.report.Report`."""
    with_one = Systems({text: count for text, count in systems.items() if text})
    text, count = next(iter(with_one.most_common(1)), (None, 0))
    return {"system": text if count >= SHARED * systems.total() else None, "system_rows": with_one.total()}


@dataclass
class LongRows:
    """Rows that are too long where that is an error: how many, the first, its tokens, and the longest."""

    count: int = 0
    first: str = ""
    tokens: int = 0
    longest: int = 0

    def add(self, other: LongRows) -> None:
        """Count those of rows that come later."""
        if not self.count:
            self.first, self.tokens = other.first, other.tokens
        self.count += other.count
        self.longest = max(self.longest, other.longest)

    def error(self, limit: int, *, can_split: bool = True) -> UserError:
        """What is said of them."""
        many = f"{self.count:,} rows are" if self.count > 1 else "1 row is"
        ways = "cut (truncate), drop, or split" if can_split else "cut (truncate) or drop"
        what = f"{many} longer than {limit:,} tokens; the first has {self.tokens:,}"
        hint = f"set data.max_length: {self.longest} to fit all, or data.long_rows: {ways}"
        return UserError(what, where=self.first, hint=hint)


def nothing_left(name: str, account: Account, bad: BadRows, skipped: int, hint: str) -> UserError:
    """Return the error for a file without usable rows. It contains the first reason if rows cannot be used."""
    long, bare = account["dropped_long"], account["without_label"]
    invalid = f", {skipped:,} invalid" if skipped else ""
    what = f"no usable rows: {long:,} too long, {bare:,} without a label{invalid}"
    if skipped and (first := next(bad.lines(), None)) is not None:
        hint = f"correct the rows; the first error is in {first['where']}: {first['error']}"
    return UserError(what, where=name, hint=hint)


class ChunkReader:
    """Makes examples of at most ``data.max_length`` tokens, which have labels, of the rows of one source.

    Args:
        encoder: renders and tokenizes.
        form: the format of the rows.
        settings: ``columns``, ``system``, ``max_length`` and ``long_rows`` are read.
        bad: told of rows that cannot be used.

    Attributes:
        account: of all rows read so far. systems: their system messages.
        long: rows that are too long, where that is an error.
    """

    def __init__(self, encoder: Encoder, form: Form, settings: DataSettings, bad: BadRows) -> None:
        self.account, self.systems = Account(), Systems()
        self.long = LongRows()
        self._encoder = encoder
        self._form = form
        self._settings = settings
        self._bad = bad

    def read(self, rows: Rows, indices: Sequence[int]) -> list[list[Example]]:
        """The examples of the rows at ``indices``, of each in a list of its own.

        Several come of one row if its template renders earlier turns differently once more turns follow, or
        if it is divided. They have the same ``row`` and belong on the same side of a split.

        Raises:
            BadRowError: a row cannot be used, and ``data.bad_rows`` is "error".
        """
        places = [rows.place(index) for index in indices]

        def on_bad(place: int, error: BadRowError) -> None:
            self._bad.add(error, rows[indices[place]][1])

        read = read_records(rows, indices, self._form, self._settings.columns, on_bad)
        records = [with_system(record, self._settings.system) for record in read]
        encoded = self._encoder.encode(records, places, on_bad)
        found: list[list[Example]] = []
        for place, (index, record, parts) in enumerate(zip(indices, records, encoded, strict=True)):
            examples: list[Example] = []
            if record is not None and parts:
                try:
                    examples = self._examples(rows[index][0], record, parts, places[place])
                except BadRowError as error:
                    on_bad(place, error)
                count_system(self.systems, record)
            found.append(examples)
        return found

    def _examples(self, number: int, record: Record, parts: list[Encoded], where: str) -> list[Example]:
        limit, account = self._settings.max_length, self.account
        longest = max(len(part.tokens) for part in parts)
        labels = sum(stop - start for part in parts for start, stop in part.spans)
        if longest > limit and self._settings.long_rows == "split" and labels:
            parts = split_long(record, parts, self._encoder, limit, where)
            account["split"] += 1
            account["split_examples"] += len(parts)
        elif len(parts) > 1:
            account["unrolled"] += 1
            account["unrolled_examples"] += len(parts)
        account["trailing_turns"] += getattr(record, "trailing", 0) > 0
        found = (limited((example_of(number, part),), where, self._settings, account, self.long) for part in parts)
        return [example for examples in found for example in examples or ()]


def limited(
    examples: tuple[Example, ...], where: str, settings: DataSettings, account: Account, long: LongRows
) -> tuple[Example, ...] | None:
    """The examples that one loss sees together with at most ``data.max_length`` tokens each; None if they are
    dropped, which is counted."""
    limit, longest = settings.max_length, max(map(len, examples))
    labels = sum(example.label_count for example in examples)
    if longest > limit and settings.long_rows == "error":
        long.add(LongRows(1, where, longest, longest))
        return None
    if longest > limit and settings.long_rows == "drop":
        account["dropped_long"] += 1
        account["labels_dropped"] += labels
        return None
    shortened = examples
    if longest > limit:
        shortened = tuple(example.shortened(limit) for example in examples)
        account["labels_cut"] += labels - sum(example.label_count for example in shortened)
    if not all(example.label_count for example in shortened) or not differ(shortened):
        account["without_label"] += 1  # or nothing is left that distinguishes the answers
        return None
    if longest > limit:
        account["cut"] += 1
        account["tokens_cut"] += sum(map(len, examples)) - sum(map(len, shortened))
    return shortened


def differ(examples: tuple[Example, ...]) -> bool:
    """Whether no two examples are the same tokens with the same labels."""
    return len(examples) == 1 or len({key_of(example) for example in examples}) == len(examples)


def example_of(number: int, part: Encoded) -> Example:
    """Tokens and spans as arrays."""
    tokens = np.asarray(part.tokens, dtype=np.int32)
    is_label = np.zeros(len(tokens), dtype=bool)
    for start, end in part.spans:
        is_label[start:end] = True
    return Example(number, tokens, is_label, min(part.prompt_length, len(tokens)), part.answer)
