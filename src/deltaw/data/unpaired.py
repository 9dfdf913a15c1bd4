"""Rows with one answer each, and whether it is desired, become examples for a loss of unpaired answers (KTO).

The form is TRL's: ``prompt``, ``completion`` and ``label`` (true or false). Each row comes with a second one,
its prompt with the answer of another row, of which the loss estimates how far the model has moved. It knows
neither models nor batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.answer_reader import AnswerReader
from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, read_pair
from deltaw.data.messages import WRONG_TYPE
from deltaw.data.progress import Say, silent
from deltaw.data.report import Report
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings
from deltaw.data.split import check_group, choose, divide, evaluated, groups_of
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEEDS = ("prompt", "completion", "label")
_MISMATCHING = 3  # a random stream of the data's seed


@dataclass(frozen=True)
class PreparedAnswers:
    """Answers to train on, answers held out, the report on all rows, and those that cannot be used.

    An answer is a group of two rows: the prompt with its own answer, and with that of another row.
    """

    train: list[RowGroup]
    held_out: list[RowGroup]
    report: Report
    skipped: BadRows


def prepare_unpaired(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, say: Say = silent
) -> PreparedAnswers:
    """Read the answers of a run.

    Args:
        settings: the ``data:`` section.
        tokenizer: of the model to be trained.
        seed: for choosing rows, holding rows out, and which answers come to which other prompts.
        say: told how far a long reading is.

    Raises:
        UserError: the data cannot be used, or has fewer than two rows to train on.
    """
    reader = _UnpairedReader(settings, tokenizer, BadRows(settings.bad_rows), say)
    rows = reader.open(settings.train)
    check_group(rows.name, rows.columns, settings.group)
    answers, kept, report = reader.read(rows, choose(len(rows), settings.rows, seed))
    train, held_out, report = divide(
        answers,
        groups_of(rows, kept, settings.group) if settings.group else _prompts(answers),
        report,
        settings,
        seed=seed,
        key=_key,
        read_apart=lambda name: _read_file(name, settings, tokenizer, reader.bad, say),
    )
    if len(train) < 2:
        raise UserError(
            "a single row to train on gives no other row's answer, of which kto estimates how far the model "
            "has moved",
            where=rows.name,
            hint="add rows, or hold out fewer with data.eval",
        )
    limit = settings.max_length
    return PreparedAnswers(
        with_mismatched(train, limit, seed), with_mismatched(held_out, limit, seed), report, reader.bad
    )


def prepare_unpaired_file(
    reference: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows | None = None,
    *,
    say: Say = silent,
) -> tuple[list[RowGroup], Report]:
    """Read one file as evaluation data, with all its answers, duplicates included.

    Args:
        bad: also told of rows that cannot be used.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    answers, report = _read_file(reference, settings, tokenizer, bad, say)
    return with_mismatched(answers, settings.max_length, 0), report


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
    prompts = [row.tokens[: row.prompt_length].tobytes() for row in rows]
    # Rows of one prompt side by side; turned by the size of the largest such run, none meets its own prompt
    # unless that prompt has more than half of all rows.
    first: dict[bytes, int] = {}
    for place, number in enumerate(order):
        first.setdefault(prompts[number], place)
    order.sort(key=lambda number: first[prompts[number]])
    counts: dict[bytes, int] = {}
    for prompt in prompts:
        counts[prompt] = counts.get(prompt, 0) + 1
    turn = max(counts.values(), default=1)
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


class _UnpairedReader(AnswerReader):
    """Reads files of single answers."""

    needs = _NEEDS
    answers = ("completion",)
    form = "unpaired answers"
    noun = "an answer"

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        for column in _NEEDS:
            if row.get(column) is None:
                found = "is empty (null)" if column in row else "is missing"
                raise BadRowError(
                    f"'{column}' {found}",
                    reason=f"'{column}' {found}",
                    where=where,
                    hint="every row has 'prompt', 'completion' and 'label' (true or false)",
                )
        _desired(row["label"], where)
        return (read_pair(row, where),)

    def same(self, where: str) -> BadRowError:
        raise AssertionError("one answer is not the same as another")

    def group(self, examples: tuple[Example, ...], row: Row) -> RowGroup:
        return RowGroup((replace(examples[0], desired=_desired(row["label"], "")),))


def _desired(label: object, where: str) -> bool:
    """A row's label.

    Raises:
        BadRowError: it is neither true nor false.
    """
    known = {"true": True, "1": True, "false": False, "0": False}
    name = str(label).strip().lower()
    if isinstance(label, bool | int | str) and name in known:
        return known[name]
    raise BadRowError(
        f"'label' must be true or false but is {str(label)[:40]!r}",
        reason=WRONG_TYPE,
        where=where,
        hint="true: the answer is one to write; false: it is not",
    )


def _read_file(
    reference: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows | None,
    say: Say,
) -> tuple[list[RowGroup], Report]:
    reader = _UnpairedReader(settings, tokenizer, BadRows(settings.bad_rows) if bad is None else bad, say)
    rows = reader.open(reference)
    answers, _, report = reader.read(rows, range(len(rows)))
    return answers, evaluated(answers, report, _key)


def _prompts(answers: Sequence[RowGroup]) -> list[Hashable]:
    """The prompt of each answer, so that those to one prompt are all trained on or all held out; nothing
    where all have the same."""
    rows = [group.rows[0] for group in answers]
    prompts: list[Hashable] = [row.tokens[: row.prompt_length].tobytes() for row in rows]
    return prompts if len(set(prompts)) > 1 else [None] * len(rows)


def _key(group: RowGroup) -> bytes:
    return key_of(group.rows[0]) + bytes([bool(group.rows[0].desired)])
