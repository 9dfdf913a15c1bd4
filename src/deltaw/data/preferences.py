"""Rows with answers to a prompt: pairs of a chosen and a rejected one, or single ones that are desired or not.

The forms of pairs are TRL's: ``prompt``, ``chosen`` and ``rejected``, each text or messages; without ``prompt``,
what both answers begin with is the prompt. Single answers are ``prompt``, ``completion`` and ``label`` (true or
false), for a loss of unpaired answers (KTO). A row becomes a group of examples and counts as one row. Knows neither
models nor batches.
"""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deltaw.data.check import Finding
from deltaw.data.chunk import count_system, differ, example_of, frequent
from deltaw.data.columns import JUDGED_COLUMNS, PAIR_COLUMNS
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, read_pair, require, with_system
from deltaw.data.messages import WRONG_TYPE
from deltaw.data.report import BadRowError, Refuse, Report, Say, silent
from deltaw.data.row_reader import RowReader, RunData
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row, Rows
from deltaw.data.settings import DataSettings
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # rows tokenized at once
_MISMATCHING = 3  # a random stream of the data's seed
# From this share of pairs on whose chosen answer is the longer one, length alone distinguishes most of them.
_LOPSIDED = 0.75
# Fewer pairs say nothing about a share.
_FEW_PAIRS = 20
# The paper advises that desired answers weigh, all together, between 1 and 4/3 of what the others weigh
# (arXiv 2402.01306, section 4.2).
_BALANCE = (1.0, 4 / 3)


class AnswerReader(RowReader[RowGroup]):
    """Reads files whose rows are a prompt with answers.

    Attributes:
        answers: the columns with answers.
    """

    answers: ClassVar[tuple[str, ...]]
    can_use: tuple[str, ...] = ("prompt", "system", "tools")
    too_long = "with an answer that is, with its prompt, longer than"

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, say: Say = silent) -> None:
        super().__init__(settings, tokenizer, say=say)
        if settings.form != "auto":
            raise UserError(f"{self.noun} has one form", where="data.form", hint="set it to auto")
        self.encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        self.template, self.date = self.encoder.template, self.encoder.dated

    @abc.abstractmethod
    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        """Each answer of a row with its prompt.

        Raises:
            BadRowError: a value is missing or has the wrong type.
        """

    def encode(self, records: Sequence[Record | None], places: Sequence[str], on_bad: Refuse) -> list[list[Encoded]]:
        """The tokens of records, as :meth:`deltaw.data.templates.Encoder.encode`."""
        return self.encoder.encode(records, places, on_bad)

    def group(self, examples: tuple[Example, ...], row: Row, where: str) -> RowGroup:
        """The row as what a loss sees together."""
        return RowGroup(examples)

    def groups(self, items: Sequence[RowGroup]) -> list[Hashable]:
        """The prompt of each, so that rows of one prompt are on one side; nothing if all have the same."""
        prompts: list[Hashable] = [_prompt_of(item.rows[0]) for item in items]
        return prompts if len(set(prompts)) > 1 else [None] * len(items)

    def examples(self, rows: Rows, indices: Sequence[int]) -> Iterator[RowGroup | None]:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            for index, encoded in zip(part, self._encoded(rows, part), strict=True):
                try:
                    found = None if encoded is None else self._group(rows, index, encoded)
                except BadRowError as error:
                    self.skip(rows, index, error)
                    found = None
                yield found

    def _encoded(self, rows: Rows, indices: Sequence[int]) -> list[list[list[Encoded]] | None]:
        """The tokens of each row's answers; None for a row that cannot be used."""
        count = len(self.answers)
        records: list[Record | None] = []
        places: list[str] = []
        bad: set[int] = set()

        def on_bad(place: int, error: BadRowError) -> None:
            if place // count not in bad:
                bad.add(place // count)
                self.skip(rows, indices[place // count], error)

        for number, index in enumerate(indices):
            where = rows.place(index)
            found: tuple[Record | None, ...] = (None,) * count
            try:
                found = self.records(self.row(rows, index), where)
            except BadRowError as error:
                on_bad(count * number, error)
            found = tuple(with_system(record, self.settings.system) for record in found)
            records += found
            places += [f"{where}, {column}" for column in self.answers]
        encoded = self.encode(records, places, on_bad)
        for record in records[::count]:
            if record is not None:
                count_system(self.systems, record)
        self.systems = frequent(self.systems)
        return [None if n in bad else encoded[count * n : count * (n + 1)] for n in range(len(indices))]

    def _group(self, rows: Rows, index: int, encoded: list[list[Encoded]]) -> RowGroup | None:
        """A row; None if it is dropped, which is counted.

        Raises:
            BadRowError: it cannot be used.
        """
        where = rows.place(index)
        if max(map(len, encoded)) > 1:
            what = "the template rewrites earlier turns of an answer with several, so it is no single row"
            hint = "let the answers be one turn each, or set data.labels: last"
            raise BadRowError(
                what, reason="an answer of several turns that the template rewrites", where=where, hint=hint
            )
        if not all(encoded):
            self.account["without_label"] += 1
            return None
        examples = tuple(example_of(rows.number(index), parts[0]) for parts in encoded)
        if not differ(examples):
            raise _same(where)
        limited = self.limited(RowGroup(examples), where)
        return limited and self.group(limited.rows, self.row(rows, index), where)


def _prompt_of(row: Example) -> bytes:
    return row.tokens[: row.prompt_length].tobytes()


class PairReader(AnswerReader):
    """Reads files of pairs."""

    needs = answers = PAIR_COLUMNS
    form = "preference pairs"
    noun = "a pair"
    same = "with the same answers as an earlier one"
    torn = "whose answers another row prefers the other way round"
    torn_hint = "if one is right, remove the other; or set preference.label_smoothing"
    torn_by_content = False

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        return records_of(row, where)

    def content(self, item: RowGroup) -> bytes:
        return b"".join(sorted(map(key_of, item.rows)))

    def notes(self, item: RowGroup) -> list[str]:
        return ["the chosen answer, then the rejected one"]

    def findings(self, items: Sequence[RowGroup], report: Report) -> list[Finding]:
        """Whether a model could prefer by length alone."""
        longer = sum(pair.rows[0].label_count > pair.rows[1].label_count for pair in items)
        if len(items) < _FEW_PAIRS or longer < _LOPSIDED * len(items):
            return []
        share = f"{longer / len(items):.0%} of the pairs"
        text = f"in {share} the chosen answer is the longer one: a model may learn to write more"
        hint = "balance the lengths, or set preference.loss: simpo, which divides by them"
        return [Finding("longer_chosen", "note", longer, text, hint)]


def records_of(row: Row, where: str) -> tuple[Record, Record]:
    """The chosen and the rejected answer of a row, each with the prompt.

    Raises:
        BadRowError: a value is missing or has the wrong type, or the answers have nothing to tell them apart.
    """
    require(row, PAIR_COLUMNS, where, "every row has 'chosen' and 'rejected'")
    if row["chosen"] == row["rejected"]:
        raise _same(where)
    if row.get("prompt") is None:
        row = {**row, **_divided(row["chosen"], row["rejected"], where)}
    chosen, rejected = (read_pair({**row, "completion": row[column]}, where) for column in PAIR_COLUMNS)
    return chosen, rejected


def _divided(chosen: object, rejected: object, where: str) -> dict[str, object]:
    """A row without a prompt: what both answers begin with, and what is left of each.

    Raises:
        BadRowError: they are not of one kind, or do not begin alike.
    """
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not texts and not (isinstance(chosen, list) and isinstance(rejected, list)):
        what = "'chosen' and 'rejected' must both be text, or both lists of messages"
        raise BadRowError(what, reason=WRONG_TYPE, where=where, hint="or give the prompt they share as 'prompt'")
    assert isinstance(chosen, str | list) and isinstance(rejected, str | list)
    shorter, pairs = min(len(chosen), len(rejected)), enumerate(zip(chosen, rejected, strict=False))
    shared = next((place for place, (one, other) in pairs if one != other), shorter)
    if texts and shared and chosen[shared - 1] == " ":
        shared -= 1  # a space belongs to the word that follows it
    if not shared:
        what = "'chosen' and 'rejected' begin with nothing in common, and there is no prompt"
        raise BadRowError(what, reason="no prompt", where=where, hint="give the prompt in a column 'prompt'")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _same(where: str) -> BadRowError:
    hint = "remove the row: there is nothing to prefer"
    return BadRowError("'chosen' and 'rejected' are the same", reason="the same answer twice", where=where, hint=hint)


#
# Each row comes with a second one, its prompt with the answer of another row, of which the loss estimates how far
# the model has moved.


class UnpairedReader(AnswerReader):
    """Reads files of single answers.

    Args:
        weights: of desired and of undesired answers in the loss.
    """

    needs = JUDGED_COLUMNS
    answers = ("completion",)
    form = "unpaired answers"
    noun = "an answer"
    same = "with the answer and label of an earlier one"
    torn = "with the answer of another row and the other label"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase,
        *,
        say: Say = silent,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__(settings, tokenizer, say=say)
        self._weights = weights

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        require(row, JUDGED_COLUMNS, where, "every row has 'prompt', 'completion' and 'label' (true or false)")
        _desired(row["label"], where)
        return (read_pair(row, where),)

    def group(self, examples: tuple[Example, ...], row: Row, where: str) -> RowGroup:
        return RowGroup((replace(examples[0], desired=_desired(row["label"], where)),))

    def key(self, item: RowGroup) -> bytes:
        return self.content(item) + bytes([bool(item.rows[0].desired)])

    def content(self, item: RowGroup) -> bytes:
        return key_of(item.rows[0])

    def notes(self, item: RowGroup) -> list[str]:
        return ["desired" if item.rows[0].desired else "not desired"]

    def prepared(self, seed: int = 0) -> RunData:
        found = super().prepared(seed)
        if len(found.train) < 2:
            what = "kto estimates how far the model has moved on another row's answer, and there is a single row"
            raise UserError(what, where=found.report.source, hint="add rows, or hold out fewer with data.eval")
        return found

    def completed(self, items: list[RowGroup], seed: int) -> list[RowGroup]:
        return with_mismatched(items, self.settings.max_length, seed)

    def findings(self, items: Sequence[RowGroup], report: Report) -> list[Finding]:
        """Whether answers of one kind outweigh the others."""
        desired = sum(bool(answer.rows[0].desired) for answer in items)
        others = len(items) - desired
        if not desired or not others:
            text, hint = f"all answers are {'desired' if desired else 'undesired'}", "add answers of the other kind"
            return [Finding("one_label", "warning", len(items), text, hint)]
        ratio = self._weights[0] * desired / (self._weights[1] * others)
        if _BALANCE[0] <= ratio <= _BALANCE[1]:
            return []
        if ratio < 1:
            hint = f"preference.desirable_weight: {self._weights[1] * others / desired:.3g}"
        else:
            hint = f"preference.undesirable_weight: {self._weights[0] * desired / others:.3g}"
        text = f"{desired:,} answers are desired and {others:,} are not: one kind outweighs the other"
        return [Finding("unbalanced", "note", abs(desired - others), text, f"weigh them alike with {hint}")]


def with_mismatched(answers: Sequence[RowGroup], limit: int, seed: int) -> list[RowGroup]:
    """Each answer with a second row: its prompt with the answer of another row.

    The other row is drawn by ``seed`` once, so that a reference model runs on it once. Each answer is given
    to one other prompt, as where TRL turns the answers of a batch by one place, and to a different one where
    there is any.

    Args:
        answers: groups of one row. limit: the most tokens of a row.
    """
    rows = [group.rows[0] for group in answers]
    order = np.random.default_rng([seed % 2**64, _MISMATCHING]).permutation(len(rows)).tolist()
    prompts = list(map(_prompt_of, rows))
    # Rows of one prompt side by side; turned by the size of the largest such run, none meets its own prompt
    # unless that prompt has more than half of all rows.
    first: dict[bytes, int] = {}
    for place, number in enumerate(order):
        first.setdefault(prompts[number], place)
    order.sort(key=lambda number: first[prompts[number]])
    turn = max(Counter(prompts).values(), default=1)
    turn = 1 if turn >= len(rows) else turn
    found: list[RowGroup] = [RowGroup(())] * len(rows)
    for place, number in enumerate(order):
        own, other = rows[number], rows[order[place - turn]]
        found[number] = RowGroup((own, _answered(own, other, limit)))
    return found


def _answered(row: Example, other: Example, limit: int) -> Example:
    """The prompt of a row with the answer of another."""
    begin = other.prompt_length
    tokens = np.concatenate([row.tokens[: row.prompt_length], other.tokens[begin:]])
    is_label = np.concatenate([np.zeros(row.prompt_length, bool), other.is_label[begin:]])
    return replace(row, tokens=tokens, is_label=is_label, answer=other.answer, desired=None).shortened(limit)


def _desired(label: object, where: str) -> bool:
    """A row's label.

    Raises:
        BadRowError: it is neither true nor false.
    """
    known = {"true": True, "1": True, "false": False, "0": False}
    name = str(label).strip().lower()
    if isinstance(label, bool | int | str) and name in known:
        return known[name]
    what = f"'label' must be true or false but is {str(label)[:40]!r}"
    raise BadRowError(what, reason=WRONG_TYPE, where=where, hint="true: the answer is one to write; false: it is not")
