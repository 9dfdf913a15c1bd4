"""Answer pairs for reward models: each answer with its prompt as the input of a classifier.

Rows are those of :mod:`deltaw.data.preferences`, with an optional ``margin`` between the answers. With a chat template
or ``data.template: plain``, tokens are those of a language model. Otherwise prompt and answer are the two texts of a
pair, with the special tokens of the tokenizer.
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
from deltaw.data.report import BadRowError, BadRows, OnBadRow
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoded


@dataclass(frozen=True, eq=False)
class RewardPair(RowGroup):
    """Two answers as inputs of a classifier, the chosen one first.

    Attributes:
        rows: :class:`deltaw.data.example.LabeledExample` with the margin as label. While rows are read,
            :class:`deltaw.data.example.Example`.
        margin: Desired difference between the scores of the chosen and the rejected answer.
    """

    margin: float = 0.0

    @property
    def label_count(self) -> int:
        """Return 1, the number of labels of a pair."""
        return 1


def are_pairs(train: Train, settings: DataSettings) -> bool:
    """Return True if the first source has columns for a chosen and a rejected answer."""
    columns = settings.columns
    if "label" in columns or "text" in columns:
        return False
    if set(PAIR_COLUMNS) <= set(columns):
        return True
    source, max_bytes = sources_of(train)[0].reference, settings.max_row_bytes
    stream = open_source(source, BadRows("skip").add, max_bytes=max_bytes)
    stream.scan()
    return set(PAIR_COLUMNS) <= (set(stream.columns) - set(columns.values())) | set(columns)


class RewardReader(PairReader):
    """Reads files of answer pairs for a classifier."""

    can_use = (*PairReader.can_use, "margin")
    predicts: tuple[str, ...] = ("score_chosen", "score_rejected")

    def encode(
        self, records: Sequence[Record | None], locations: Sequence[str], on_bad: OnBadRow
    ) -> list[list[Encoded]]:
        if self.encoder.chat or self.settings.template == "plain":
            return super().encode(records, locations, on_bad)
        result: list[list[Encoded]] = [[] for _ in records]
        numbers = [number for number, record in enumerate(records) if record is not None]
        if not numbers:
            return result
        texts = [_texts(record) for record in records if record is not None]
        assert self.tokenizer is not None
        encoded = self.tokenizer(
            [prompt for prompt, _ in texts], [answer for _, answer in texts], return_attention_mask=False, verbose=False
        )
        for position, (number, ids) in enumerate(zip(numbers, encoded["input_ids"], strict=True)):
            answer_start = next((n for n, text in enumerate(encoded.sequence_ids(position)) if text == 1), len(ids))
            if answer_start < len(ids):  # the labels are all tokens after the prompt
                result[number].append(Encoded(list(ids), [(answer_start, len(ids))], answer_start, texts[position][1]))
        return result

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> RowGroup:
        return RewardPair(examples, _margin(row.get("margin"), location))

    def finalize(self, items: list[RowGroup], seed: int) -> list[RewardPair]:
        """Convert pairs to inputs of a classifier."""
        pairs = []
        for pair in items:
            assert isinstance(pair, RewardPair)
            rows = tuple(to_labeled_example(row, pair.margin) for row in pair.rows)
            pairs.append(RewardPair(rows, pair.margin))  # type: ignore[arg-type]
        return pairs


class AnswerScoreReader(RewardReader):
    """Reads single answers with their prompts, for scoring by a reward model."""

    needs, answers = (), ("answer",)  # type: ignore[assignment]
    predicts = ("score",)

    def records(self, row: Row, location: str) -> tuple[Record, ...]:  # type: ignore[override]
        record, has_answer = read_prompt_row(row, location)
        if not has_answer:
            hint = "name it 'completion', or map it with data.columns: {completion: …}"
            raise BadRowError("the row has no answer", reason="no answer", location=location, hint=hint)
        return (record,)


def _texts(record: Record) -> tuple[str, str]:
    """Return prompt and answer of a record as two texts. In a conversation, the answer is the last message."""
    if isinstance(record, Pair):
        return "\n".join(filter(None, [record.system, record.prompt])), record.completion
    assert isinstance(record, Conversation)  # pairs cannot be plain text
    *context, last = [str(message.get("content") or "") for message in record.messages]
    return "\n".join(context), last


def _margin(value: object, location: str) -> float:
    """Return the margin of a row, 0 by default.

    Raises:
        BadRowError: if it is not a finite number.
    """
    if value is None:
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        margin = math.inf
    if isinstance(value, bool) or not math.isfinite(margin):
        message = f"'margin' must be a number but is {str(value)[:40]!r}"
        raise BadRowError(message, reason=WRONG_TYPE, location=location, hint="leave the column out for a margin of 0")
    return margin


def to_labeled_example(row: Example, margin: float) -> LabeledExample:
    """Return an answer with its prompt as input of a classifier. Segment ids are 1 for the answer."""
    segments = np.zeros(len(row), np.int8)
    segments[row.prompt_length :] = 1
    return LabeledExample(row.row, row.tokens, margin, segments)
