"""Preference rows: pairs of a chosen and a rejected answer, or single answers that are desired or not.

Pairs have TRL's columns ``prompt``, ``chosen`` and ``rejected``, each text or messages. Without ``prompt``, the common
prefix of both answers is the prompt. Single answers have ``prompt``, ``completion`` and ``label`` (true or false) and
are for the KTO loss. Each row becomes a group of examples.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deltaw.data.check import DataFinding
from deltaw.data.chunk import count_system, differ, example_of, frequent
from deltaw.data.columns import JUDGED_COLUMNS, PAIR_COLUMNS
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, read_pair, require, with_system
from deltaw.data.messages import WRONG_TYPE
from deltaw.data.report import BadRowError, LogFunction, OnBadRow, PreparationReport, quiet
from deltaw.data.row_reader import RowReader, RunData
from deltaw.data.row_store import key_of
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows per tokenizer call
_MISMATCHING = 3  # selects a random stream of the data seed
# Share of pairs with the longer answer chosen from which a note is emitted.
_LOPSIDED = 0.75
# Minimum number of pairs for this note.
_MIN_PAIRS = 20
# Recommended ratio of the total weights of desired and undesired answers (arXiv 2402.01306, section 4.2).
_BALANCE = (1.0, 4 / 3)


class AnswerReader(RowReader[RowGroup]):
    """Reads files with a prompt and one or several answers per row.

    Attributes:
        answers: Names of the columns with answers.
    """

    answers: ClassVar[tuple[str, ...]]
    can_use: tuple[str, ...] = ("prompt", "system", "tools")
    too_long_text = "with an answer that is, with its prompt, longer than"

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, log: LogFunction = quiet) -> None:
        super().__init__(settings, tokenizer, log=log)
        if settings.form != "auto":
            raise UserError(f"{self.noun} has one form", location="data.form", hint="set it to auto")
        self.encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        self.template, self.date = self.encoder.template, self.encoder.template_date

    @abc.abstractmethod
    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        """Return each answer of a row with its prompt.

        Raises:
            BadRowError: if a value is missing or has the wrong type.
        """

    def encode(
        self, records: Sequence[Record | None], locations: Sequence[str], on_bad: OnBadRow
    ) -> list[list[Encoded]]:
        """Tokenize records, see :meth:`deltaw.data.templates.Encoder.encode`."""
        return self.encoder.encode(records, locations, on_bad)

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> RowGroup:
        """Build the row group of the loss."""
        return RowGroup(examples)

    def groups(self, items: Sequence[RowGroup]) -> list[Hashable]:
        """Return the prompt of each row, so that rows with one prompt are on the same side of the split. Return None
        for all rows if they have the same prompt.
        """
        prompts: list[Hashable] = [_prompt_of(item.rows[0]) for item in items]
        return prompts if len(set(prompts)) > 1 else [None] * len(items)

    def examples(self, rows: NumberedRows, indices: Sequence[int]) -> Iterator[RowGroup | None]:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            for index, encoded in zip(part, self._encoded(rows, part), strict=True):
                try:
                    group = None if encoded is None else self._group(rows, index, encoded)
                except BadRowError as error:
                    self.skip(rows, index, error)
                    group = None
                yield group

    def _encoded(self, rows: NumberedRows, indices: Sequence[int]) -> list[list[list[Encoded]] | None]:
        """Return the tokens of each row's answers, or None if the row is unusable."""
        count = len(self.answers)
        records: list[Record | None] = []
        locations: list[str] = []
        bad: set[int] = set()

        def on_bad(position: int, error: BadRowError) -> None:
            if position // count not in bad:
                bad.add(position // count)
                self.skip(rows, indices[position // count], error)

        for number, index in enumerate(indices):
            location = rows.row_location(index)
            answers: tuple[Record | None, ...] = (None,) * count
            try:
                answers = self.records(self.row(rows, index), location)
            except BadRowError as error:
                on_bad(count * number, error)
            answers = tuple(with_system(record, self.settings.system) for record in answers)
            records += answers
            locations += [f"{location}, {column}" for column in self.answers]
        encoded = self.encode(records, locations, on_bad)
        for record in records[::count]:
            if record is not None:
                count_system(self.systems, record)
        self.systems = frequent(self.systems)
        return [None if n in bad else encoded[count * n : count * (n + 1)] for n in range(len(indices))]

    def _group(self, rows: NumberedRows, index: int, encoded: list[list[Encoded]]) -> RowGroup | None:
        """Build the group of a row, or return None if the row is dropped (and counted).

        Raises:
            BadRowError: if the row is unusable.
        """
        location = rows.row_location(index)
        if max(map(len, encoded)) > 1:
            message = "the template rewrites earlier turns of an answer of several turns, which would be several rows"
            hint = "use answers of one turn, or set data.labels: last"
            raise BadRowError(message, reason="a rewritten answer of several turns", location=location, hint=hint)
        if not all(encoded):
            self.account["without_label"] += 1
            return None
        examples = tuple(example_of(rows.number(index), parts[0]) for parts in encoded)
        if not differ(examples):
            raise _identical_answers(location)
        group = self.limit_length(RowGroup(examples), location)
        return group and self.group(group.rows, self.row(rows, index), location)


def _prompt_of(row: Example) -> bytes:
    return row.tokens[: row.prompt_length].tobytes()


class PairReader(AnswerReader):
    """Reads files with preference pairs."""

    needs = answers = PAIR_COLUMNS
    form = "preference pairs"
    noun = "a pair"
    duplicate_text = "with the same answers as an earlier one"
    contradiction_text = "whose answers another row prefers the other way round"
    contradiction_hint = "if one is right, remove the other; or set preference.label_smoothing"
    contradictions_by_content = False

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        return records_of(row, location)

    def content(self, item: RowGroup) -> bytes:
        return b"".join(sorted(map(key_of, item.rows)))

    def notes(self, item: RowGroup) -> list[str]:
        return ["the chosen answer, then the rejected one"]

    def findings(self, items: Sequence[RowGroup], report: PreparationReport) -> list[DataFinding]:
        """Note if the chosen answers are mostly the longer ones."""
        longer = sum(pair.rows[0].label_count > pair.rows[1].label_count for pair in items)
        if len(items) < _MIN_PAIRS or longer < _LOPSIDED * len(items):
            return []
        share = f"{longer / len(items):.0%} of the pairs"
        text = f"in {share} the chosen answer is longer, so the model may learn to write longer answers"
        hint = "balance the lengths, or set preference.loss: simpo, which divides by them"
        return [DataFinding("longer_chosen", "note", longer, text, hint)]


def records_of(row: Row, location: str) -> tuple[Record, Record]:
    """Return the chosen and the rejected answer of a row, each with the prompt.

    Raises:
        BadRowError: if a value is missing or has the wrong type, or if the answers are identical.
    """
    require(row, PAIR_COLUMNS, location, "every row has 'chosen' and 'rejected'")
    if row["chosen"] == row["rejected"]:
        raise _identical_answers(location)
    if row.get("prompt") is None:
        row = {**row, **_split_prompt(row["chosen"], row["rejected"], location)}
    chosen, rejected = (read_pair({**row, "completion": row[column]}, location) for column in PAIR_COLUMNS)
    return chosen, rejected


def _split_prompt(chosen: object, rejected: object, location: str) -> dict[str, object]:
    """Split a row without a prompt into the common prefix of both answers, and the remainder of each.

    Raises:
        BadRowError: if the answers have different types or no common prefix.
    """
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not texts and not (isinstance(chosen, list) and isinstance(rejected, list)):
        message = "'chosen' and 'rejected' must both be text, or both lists of messages"
        raise BadRowError(message, reason=WRONG_TYPE, location=location, hint="or give their prompt as 'prompt'")
    assert isinstance(chosen, str | list) and isinstance(rejected, str | list)
    shorter, pairs = min(len(chosen), len(rejected)), enumerate(zip(chosen, rejected, strict=False))
    shared = next((position for position, (left, right) in pairs if left != right), shorter)
    if texts and shared and chosen[shared - 1] == " ":
        shared -= 1  # a space belongs to the word that follows it
    if not shared:
        message = "'chosen' and 'rejected' have nothing in common at the start, and the row has no prompt"
        raise BadRowError(message, reason="no prompt", location=location, hint="give the prompt in a column 'prompt'")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _identical_answers(location: str) -> BadRowError:
    hint = "remove the row, which expresses no preference"
    return BadRowError("both answers are the same", reason="the same answer twice", location=location, hint=hint)


class UnpairedReader(AnswerReader):
    """Reads files of single answers.

    Each row gets a second example, its prompt with the answer of another row, from which the loss estimates the
    divergence from the reference model.

    Args:
        weights: Weights of desired and undesired answers in the loss.
    """

    needs = JUDGED_COLUMNS
    answers = ("completion",)
    form = "unpaired answers"
    noun = "an answer"
    duplicate_text = "with the answer and label of an earlier one"
    contradiction_text = "with the answer of another row and the other label"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        log: LogFunction = quiet,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(settings, tokenizer, log=log)
        self._weights = weights

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        require(row, JUDGED_COLUMNS, location, "every row has 'prompt', 'completion' and 'label' (true or false)")
        _desired(row["label"], location)
        return (read_pair(row, location),)

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> RowGroup:
        return RowGroup((replace(examples[0], desired=_desired(row["label"], location)),))

    def key(self, item: RowGroup) -> bytes:
        return self.content(item) + bytes([bool(item.rows[0].desired)])

    def content(self, item: RowGroup) -> bytes:
        return key_of(item.rows[0])

    def notes(self, item: RowGroup) -> list[str]:
        return ["desired" if item.rows[0].desired else "not desired"]

    def prepare(self, seed: int = 0) -> RunData:
        data = super().prepare(seed)
        if len(data.train) < 2:
            message = "kto estimates the divergence with another row's answer, and the data has a single row"
            raise UserError(message, location=data.report.source, hint="add rows, or hold out fewer with data.eval")
        return data

    def finalize(self, items: list[RowGroup], seed: int) -> list[RowGroup]:
        return add_mismatched(items, self.settings.max_length, seed)

    def findings(self, items: Sequence[RowGroup], report: PreparationReport) -> list[DataFinding]:
        """Note if one kind of answers outweighs the other."""
        desired = sum(bool(answer.rows[0].desired) for answer in items)
        undesired = len(items) - desired
        if not desired or not undesired:
            text, hint = f"all answers are {'desired' if desired else 'undesired'}", "add answers of the other kind"
            return [DataFinding("one_label", "warning", len(items), text, hint)]
        ratio = self._weights[0] * desired / (self._weights[1] * undesired)
        if _BALANCE[0] <= ratio <= _BALANCE[1]:
            return []
        if ratio < 1:
            hint = f"preference.desirable_weight: {self._weights[1] * undesired / desired:.3g}"
        else:
            hint = f"preference.undesirable_weight: {self._weights[0] * desired / undesired:.3g}"
        text = f"{desired:,} answers are desired and {undesired:,} are not, so one kind outweighs the other"
        return [DataFinding("unbalanced", "note", abs(desired - undesired), text, f"weigh them alike with {hint}")]


def add_mismatched(answers: Sequence[RowGroup], max_length: int, seed: int) -> list[RowGroup]:
    """Add a mismatched row to each answer: its prompt with the answer of another row.

    The other row is chosen once, by ``seed``, so that the reference model evaluates it once. As in TRL, answers are
    shifted against the prompts, here by a distance that avoids pairing a prompt with its own answers if possible.

    Args:
        answers: Groups of one row.
        max_length: Maximum number of tokens of a row.
    """
    rows = [group.rows[0] for group in answers]
    order = np.random.default_rng([seed % 2**64, _MISMATCHING]).permutation(len(rows)).tolist()
    prompts = list(map(_prompt_of, rows))
    # Sort rows of one prompt next to each other. A shift by the size of the largest run pairs no row with its own
    # prompt, unless more than half of all rows have that prompt.
    first_position: dict[bytes, int] = {}
    for position, index in enumerate(order):
        first_position.setdefault(prompts[index], position)
    order.sort(key=lambda index: first_position[prompts[index]])
    shift = max(Counter(prompts).values(), default=1)
    shift = 1 if shift >= len(rows) else shift
    groups: list[RowGroup] = [RowGroup(())] * len(rows)
    for position, index in enumerate(order):
        row, other = rows[index], rows[order[position - shift]]
        groups[index] = RowGroup((row, _with_answer(row, other, max_length)))
    return groups


def _with_answer(row: Example, other: Example, max_length: int) -> Example:
    """Return the prompt of a row with the answer of another row."""
    answer_start = other.prompt_length
    tokens = np.concatenate([row.tokens[: row.prompt_length], other.tokens[answer_start:]])
    is_label = np.concatenate([np.zeros(row.prompt_length, bool), other.is_label[answer_start:]])
    return replace(row, tokens=tokens, is_label=is_label, answer=other.answer, desired=None).truncate(max_length)


def _desired(label: object, location: str) -> bool:
    """Return the label of a row.

    Raises:
        BadRowError: if it is neither true nor false.
    """
    values = {"true": True, "1": True, "false": False, "0": False}
    name = str(label).strip().lower()
    if isinstance(label, bool | int | str) and name in values:
        return values[name]
    message = f"'label' must be true or false but is {str(label)[:40]!r}"
    raise BadRowError(message, reason=WRONG_TYPE, location=location, hint="true: the answer is desired; false: not")
