"""Rows with a chosen and a rejected answer become pairs of examples with the same prompt.

The forms are TRL's: ``prompt``, ``chosen`` and ``rejected``, each text or messages; without ``prompt``, what
both answers begin with is the prompt. Report, limits, duplicates and splits are those of other rows; a pair
counts as one row. It knows neither models nor batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltaw.data.answer_reader import AnswerReader
from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.example import RowGroup
from deltaw.data.formats import Record, read_pair
from deltaw.data.messages import WRONG_TYPE
from deltaw.data.progress import Say, silent
from deltaw.data.report import Report
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row
from deltaw.data.settings import DataSettings
from deltaw.data.split import check_group, choose, divide, evaluated, groups_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEEDS = ("chosen", "rejected")
_CAN_USE = ("prompt", "system", "tools")
_CHUNK = 1024  # pairs tokenized at once


@dataclass(frozen=True)
class PreparedPairs:
    """Pairs to train on, pairs held out, the report on all rows, and those that cannot be used."""

    train: list[RowGroup]
    held_out: list[RowGroup]
    report: Report
    skipped: BadRows


def prepare_pairs(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, say: Say = silent
) -> PreparedPairs:
    """Read the pairs of a run.

    Args:
        settings: the ``data:`` section.
        tokenizer: of the model to be trained.
        seed: for choosing rows (``rows``) and holding rows out.
        say: told how far a long reading is.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    reader = PairReader(settings, tokenizer, BadRows(settings.bad_rows), say)
    rows = reader.open(settings.train)
    check_group(rows.name, rows.columns, settings.group)
    pairs, kept, report = reader.read(rows, choose(len(rows), settings.rows, seed))
    train, held_out, report = divide(
        pairs,
        groups_of(rows, kept, settings.group) if settings.group else prompts_of(pairs),
        report,
        settings,
        seed=seed,
        key=_key,
        read_apart=lambda name: prepare_pair_file(name, settings, tokenizer, reader.bad, say=say),
    )
    return PreparedPairs(train, held_out, _with_longest(report, [*train, *held_out]), reader.bad)


def prepare_pair_file(
    reference: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows | None = None,
    *,
    say: Say = silent,
) -> tuple[list[RowGroup], Report]:
    """Read one file as evaluation data, with all its pairs, duplicates included.

    Args:
        bad: also told of rows that cannot be used.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    reader = PairReader(settings, tokenizer, BadRows(settings.bad_rows) if bad is None else bad, say)
    rows = reader.open(reference)
    pairs, _, report = reader.read(rows, range(len(rows)))
    return pairs, _with_longest(evaluated(pairs, report, _key), pairs)


def records_of(row: Row, where: str) -> tuple[Record, Record]:
    """The chosen and the rejected answer of a row, each with the prompt.

    Raises:
        BadRowError: a value is missing or has the wrong type, or the answers have nothing to tell them apart.
    """
    for column in _NEEDS:
        if row.get(column) is None:
            found = "is empty (null)" if column in row else "is missing"
            raise BadRowError(
                f"'{column}' {found}",
                reason=f"'{column}' {found}",
                where=where,
                hint="every row has 'chosen' and 'rejected'",
            )
    if row["chosen"] == row["rejected"]:
        raise _same(where)
    if row.get("prompt") is None:
        row = {**row, **_divided(row["chosen"], row["rejected"], where)}
    chosen, rejected = (read_pair({**row, "completion": row[column]}, where) for column in _NEEDS)
    return chosen, rejected


def _divided(chosen: object, rejected: object, where: str) -> dict[str, object]:
    """A row without a prompt: what both answers begin with, and what is left of each.

    Raises:
        BadRowError: they are not of one kind, or do not begin alike.
    """
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if not texts and not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise BadRowError(
            "'chosen' and 'rejected' must both be text, or both lists of messages",
            reason=WRONG_TYPE,
            where=where,
            hint="or give the prompt they share in a column 'prompt'",
        )
    assert isinstance(chosen, str | list) and isinstance(rejected, str | list)
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    if texts and shared and chosen[shared - 1] == " ":
        shared -= 1  # a space belongs to the word that follows it
    if not shared:
        raise BadRowError(
            "'chosen' and 'rejected' begin with nothing in common, and there is no prompt",
            reason="no prompt",
            where=where,
            hint="give the prompt in a column 'prompt'",
        )
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


class PairReader(AnswerReader):
    """Reads files of pairs."""

    needs = answers = _NEEDS
    form = "preference pairs"
    noun = "a pair"

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        return records_of(row, where)

    def same(self, where: str) -> BadRowError:
        return _same(where)


def _same(where: str) -> BadRowError:
    return BadRowError(
        "'chosen' and 'rejected' are the same",
        reason="the same answer twice",
        where=where,
        hint="remove the row: there is nothing to prefer",
    )


def prompts_of(pairs: Sequence[RowGroup]) -> list[Hashable]:
    """The prompt of each pair, so that pairs of one prompt are all trained on or all held out; nothing where
    all have the same."""
    prompts: list[Hashable] = [pair.rows[0].tokens[: pair.rows[0].prompt_length].tobytes() for pair in pairs]
    return prompts if len(set(prompts)) > 1 else [None] * len(pairs)


def _key(pair: RowGroup) -> bytes:
    return b"".join(key_of(row) for row in pair.rows)


def _with_longest(report: Report, pairs: Sequence[RowGroup]) -> Report:
    """The report with the longest answer's tokens, prompt included, in place of the longest pair's."""
    return replace(report, longest=max(len(row) for pair in pairs for row in pair.rows))
