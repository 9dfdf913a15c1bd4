"""Pairs of answers for a reward model: each answer with its prompt as a text that a classifier reads.

Rows are those of :mod:`deltaw.data.preferences`, and may have a ``margin``, by which the chosen answer is
better. With a chat template, or with ``data.template: plain``, the tokens are those that a language model is
trained on; a tokenizer without a template gets prompt and answer as the two texts of a pair, with its own
special tokens. It knows neither models nor batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltaw.data.columns import PAIR_COLUMNS
from deltaw.data.example import Example, LabeledExample, RowGroup
from deltaw.data.formats import Pair, Record
from deltaw.data.messages import WRONG_TYPE, Conversation
from deltaw.data.mixture import Train, sources_of
from deltaw.data.preferences import PairReader
from deltaw.data.prompts import read_prompt_row
from deltaw.data.report import BadRowError, BadRows, Refuse
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoded


@dataclass(frozen=True, eq=False)
class RewardPair(RowGroup):
    """Two answers as a classifier reads them, the chosen one first.

    Attributes:
        rows: :class:`deltaw.data.example.LabeledExample`, whose label is the pair's margin; answers of a
            language model while they are read.
        margin: by how much the chosen answer should be better.
    """

    margin: float = 0.0

    @property
    def label_count(self) -> int:
        """A pair counts once."""
        return 1


def are_pairs(train: Train, settings: DataSettings) -> bool:
    """Whether the rows have a chosen and a rejected answer, by the columns of their first source."""
    columns = settings.columns
    if "label" in columns or "text" in columns:
        return False
    if set(PAIR_COLUMNS) <= set(columns):
        return True
    source, most = sources_of(train)[0].reference, settings.max_row_bytes
    stream = open_source(source, BadRows("skip").add, max_bytes=most)
    stream.scan()
    return set(PAIR_COLUMNS) <= (set(stream.columns) - set(columns.values())) | set(columns)


class RewardReader(PairReader):
    """Reads files of pairs for a classifier."""

    can_use = (*PairReader.can_use, "margin")
    predicts: tuple[str, ...] = ("score_chosen", "score_rejected")

    def encode(self, records: Sequence[Record | None], places: Sequence[str], on_bad: Refuse) -> list[list[Encoded]]:
        if self.encoder.chat or self.settings.template == "plain":
            return super().encode(records, places, on_bad)
        found: list[list[Encoded]] = [[] for _ in records]
        numbers = [number for number, record in enumerate(records) if record is not None]
        if not numbers:
            return found
        texts = [_texts(record) for record in records if record is not None]
        assert self.tokenizer is not None
        encoded = self.tokenizer(
            [prompt for prompt, _ in texts], [answer for _, answer in texts], return_attention_mask=False, verbose=False
        )
        for place, (number, ids) in enumerate(zip(numbers, encoded["input_ids"], strict=True)):
            begin = next((n for n, text in enumerate(encoded.sequence_ids(place)) if text == 1), len(ids))
            if begin < len(ids):  # all that follows the prompt tells the answers apart
                found[number].append(Encoded(list(ids), [(begin, len(ids))], begin, texts[place][1]))
        return found

    def group(self, examples: tuple[Example, ...], row: Row, where: str) -> RowGroup:
        return RewardPair(examples, _margin(row.get("margin"), where))

    def completed(self, items: list[RowGroup], seed: int) -> list[RewardPair]:
        """Pairs as a classifier reads them."""
        found = []
        for pair in items:
            assert isinstance(pair, RewardPair)
            rows = tuple(labeled(row, pair.margin) for row in pair.rows)
            found.append(RewardPair(rows, pair.margin))  # type: ignore[arg-type]
        return found


class AnswerScoreReader(RewardReader):
    """Reads single answers with their prompts, for a reward model to score."""

    needs, answers = (), ("answer",)  # type: ignore[assignment]
    predicts = ("score",)

    def records(self, row: Row, where: str) -> tuple[Record, ...]:  # type: ignore[override]
        record, has_answer = read_prompt_row(row, where)
        if not has_answer:
            hint = "name it 'completion', or map it with data.columns: {completion: …}"
            raise BadRowError("the row has no answer", reason="no answer", where=where, hint=hint)
        return (record,)


def _texts(record: Record) -> tuple[str, str]:
    """Prompt and answer of a record as two texts; of a conversation, all before its last message, and it."""
    if isinstance(record, Pair):
        return "\n".join(filter(None, [record.system, record.prompt])), record.completion
    assert isinstance(record, Conversation)  # a pair is never plain text alone
    *before, last = [str(message.get("content") or "") for message in record.messages]
    return "\n".join(before), last


def _margin(value: object, where: str) -> float:
    """A row's margin; 0 where it has none.

    Raises:
        BadRowError: it is no finite number.
    """
    if value is None:
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        margin = math.inf
    if isinstance(value, bool) or not math.isfinite(margin):
        what = f"'margin' must be a number but is {str(value)[:40]!r}"
        raise BadRowError(what, reason=WRONG_TYPE, where=where, hint="leave the column out for a margin of 0")
    return margin


def labeled(row: Example, margin: float) -> LabeledExample:
    """An answer with its prompt as a classifier reads them; models that are told which text a token belongs to get 1
    for the answer's."""
    segments = np.zeros(len(row), np.int8)
    segments[row.prompt_length :] = 1
    return LabeledExample(row.row, row.tokens, margin, segments)
