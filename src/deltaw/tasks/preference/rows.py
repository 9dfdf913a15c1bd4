"""Preference rows: pairs of a chosen and a rejected answer, or single answers that are desired or not.

Pairs have TRL's columns ``prompt``, ``chosen`` and ``rejected``, each text or messages. Without ``prompt``, the common
prefix of both answers is the prompt. Single answers have ``prompt``, ``completion`` and ``label`` (true or false) and
are for the KTO loss. Each row becomes a group of examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.bad_rows import BadRowError
from deltaw.data.data_findings import DataFinding
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, read_pair, require
from deltaw.data.messages import WRONG_TYPE
from deltaw.data.prompts import AnswerReader, prompt_key, records_of
from deltaw.data.report import PreparationReport
from deltaw.data.row_reader import RunData
from deltaw.data.row_store import key_of
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.starter import TaskStarter
from deltaw.errors import UserError
from deltaw.progress import LogFunction, ignore_line
from deltaw.settings.data import DataSettings
from deltaw.settings.row_kinds import JUDGED_COLUMNS, PAIR_COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MISMATCHING = 3  # selects a random stream of the data seed
# Share of pairs with the longer answer chosen from which a note is emitted.
_LOPSIDED = 0.75
# Minimum number of pairs for this note.
_MIN_PAIRS = 20
# Recommended ratio of the total weights of desired and undesired answers (arXiv 2402.01306, section 4.2).
_BALANCE = (1.0, 4 / 3)


class PreferenceStarter(TaskStarter):
    """Starter of the task: pairs of answers, or single answers."""

    def section(self, form: str, columns: Collection[str]) -> tuple[str, ...]:
        loss = "  loss: dpo               # or ipo, orpo, simpo"
        if form == "single answers":
            loss = "  loss: kto               # for single answers, desired (label: true) or not"
        return "preference:", loss, "  beta: auto              # higher values stay closer to the base model"

    def form(self, rows: NumberedRows, columns: Mapping[str, str]) -> str:
        return "pairs of answers" if are_preferences(rows) else "single answers"

    def reader(
        self, rows: NumberedRows, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None
    ) -> AnswerReader:
        return (PairReader if are_preferences(rows) else UnpairedReader)(settings, tokenizer)


def are_preferences(rows: NumberedRows) -> bool:
    """Return True if the rows have columns for a chosen and a rejected answer."""
    return set(PAIR_COLUMNS) <= set(rows.columns)


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
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        log: LogFunction = ignore_line,
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
        for finding in self.findings(data.train, data.report):
            if finding.level == "warning":
                self._log(f"{finding.text}: {finding.hint}")
        return data

    def finalize(self, items: Sequence[RowGroup], seed: int) -> list[RowGroup]:
        return add_mismatched(items, self.settings.max_length, seed)

    def findings(self, items: Sequence[RowGroup], report: PreparationReport) -> list[DataFinding]:
        """Note if one kind of answers outweighs the other."""
        desired = sum(bool(answer.rows[0].desired) for answer in items)
        undesired = len(items) - desired
        if not desired or not undesired:
            text = f"all answers are {'desired' if desired else 'undesired'}"
            hint = "add answers of the other kind"
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
    prompts = list(map(prompt_key, rows))
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
        row = rows[index]
        other = rows[order[position - shift]]
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
