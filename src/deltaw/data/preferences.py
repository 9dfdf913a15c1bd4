"""Rows with a chosen and a rejected answer become pairs of examples with the same prompt.

The forms are TRL's: ``prompt``, ``chosen`` and ``rejected``, each text or messages; without ``prompt``, what
both answers begin with is the prompt. Report, limits, duplicates and splits are those of other rows; a pair
counts as one row. It knows neither models nor batches.
"""

from __future__ import annotations

import abc
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from deltaw.data.chunk import Account, LongRows, example_of
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, check_columns, read_pair
from deltaw.data.messages import WRONG_TYPE, without_nulls
from deltaw.data.mixture import Train, shown, sources_of
from deltaw.data.report import BadRowError, BadRows, Progress, Refuse, Report, Say, silent
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row, Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import check_group, choose, divide, evaluated, groups_of, read_rows
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# ---- Rows with answers to a prompt become groups of examples; a row that becomes none is counted.
#
# What the columns mean is a subclass's: :mod:`deltaw.data.preferences` reads pairs, :mod:`deltaw.data.preferences`
# single answers. It knows neither models nor batches.


_CHUNK = 1024  # rows tokenized at once


class AnswerReader(abc.ABC):
    """Reads files whose rows are a prompt with answers.

    Attributes:
        needs, can_use: columns that each row has, or may have. answers: the columns with answers.
        form: of the rows, for the report. noun: a row, in messages.
        bad: told of rows that cannot be used.
    """

    can_use: ClassVar[tuple[str, ...]] = ("prompt", "system", "tools")
    needs: ClassVar[tuple[str, ...]]
    answers: ClassVar[tuple[str, ...]]
    form: ClassVar[str]
    noun: ClassVar[str]

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, bad: BadRows, say: Say) -> None:
        refused = {
            "data.long_rows": (settings.long_rows == "split", f"{self.noun} cannot be divided", "cut or drop"),
            "data.form": (settings.form != "auto", f"{self.noun} has one form", "auto"),
        }
        for key, (is_refused, what, right) in refused.items():
            if is_refused:
                raise UserError(what, where=key, hint=f"set it to {right}")
        self.bad = bad
        self.tokenizer = tokenizer
        self.settings = settings
        self.encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        self._say = say
        self._known = bad.counts.copy()

    @abc.abstractmethod
    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        """Each answer of a row with its prompt.

        Raises:
            BadRowError: a value is missing or has the wrong type.
        """

    def encode(self, records: Sequence[Record | None], places: Sequence[str], on_bad: Refuse) -> list[list[Encoded]]:
        """The tokens of records, as :meth:`deltaw.data.templates.Encoder.encode`."""
        return self.encoder.encode(records, places, on_bad)

    @abc.abstractmethod
    def same(self, where: str) -> BadRowError:
        """What is said of a row whose answers do not differ."""

    def group(self, examples: tuple[Example, ...], row: Row) -> RowGroup:
        """The row as what a loss sees together."""
        return RowGroup(examples)

    def open(self, train: Train) -> Rows:
        """All rows.

        Raises:
            UserError: they cannot be read, or lack a column.
        """
        self._known = self.bad.counts.copy()
        on_bad = self.bad.add_unreadable if self.bad.mode == "skip" else None
        found = []
        for source in sources_of(train):
            if source.weight != 1 or source.columns is not None or source.form is not None:
                raise UserError(
                    f"a source whose rows are {self.form} has no weight, columns or form of its own",
                    where=f"data.train, {source.reference}",
                    hint="name the sources alone: data.train: [a.jsonl, b.jsonl]",
                )
            found.append(read_rows(source.reference, on_bad, max_bytes=self.settings.max_row_bytes))
            self._check_columns(found[-1])
        return found[0] if len(found) == 1 else Rows.joined(shown(train), found)

    def _check_columns(self, rows: Rows) -> None:
        columns = self.settings.columns
        check_columns(rows, columns)
        there = (set(rows.columns) - set(columns.values())) | set(columns)
        lacking = [column for column in self.needs if column not in there]
        if lacking:
            raise UserError(
                f"{self.form} need the column '{lacking[0]}'",
                where=f"{rows.name}, whose columns are {', '.join(map(repr, rows.columns))}",
                hint=f"{did_you_mean(lacking[0], rows.columns)}; map other names with data.columns: "
                f"{{{lacking[0]}: …}}",
            )

    def read(self, rows: Rows, chosen: Sequence[int]) -> tuple[list[RowGroup], list[int], Report]:
        """The usable rows among ``chosen`` as groups, their indices in ``rows``, and the report.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        unreadable = len(self.bad) - self._known.total()
        account, long = Account(), LongRows()
        groups: list[RowGroup] = []
        kept: list[int] = []
        progress = Progress(self._say, f"tokenizing {rows.name}", 0)
        for start in range(0, len(chosen), _CHUNK):
            part = list(chosen[start : start + _CHUNK])
            for index, encoded in zip(part, self._encoded(rows, part), strict=True):
                group = None if encoded is None else self._group(rows, index, encoded, account, long)
                if group is not None:
                    groups.append(group)
                    kept.append(index)
            progress.at(start + len(part), 0)
        limit = self.settings.max_length
        if long.count:
            raise long.error(limit, can_split=False)
        skipped = self.bad.counts - self._known
        if not groups:
            raise UserError(
                f"no row is left: {account.dropped_long:,} are too long, {account.without_label:,} have an "
                f"answer without a label, {skipped.total():,} cannot be used",
                where=rows.name,
                hint="raise data.max_length, or check the answers",
            )
        columns = self.settings.columns
        used = {columns.get(name, name) for name in self.needs + self.can_use} | {self.settings.group}
        return (
            groups,
            kept,
            Report(
                source=rows.name,
                form=self.form,
                template=self.encoder.template,
                rows_read=len(rows) + unreadable,
                rows_kept=len(groups),
                not_chosen=len(rows) - len(chosen),
                unused_columns=tuple(column for column in rows.columns if column not in used),
                date=self.encoder.dated,
                bad_rows=dict(skipped),
                **account.as_dict(),
            ),
        )

    def _encoded(self, rows: Rows, indices: Sequence[int]) -> list[list[list[Encoded]] | None]:
        """The tokens of each row's answers; None for a row that cannot be used."""
        count = len(self.answers)
        records: list[Record | None] = []
        places: list[str] = []
        bad: set[int] = set()

        def on_bad(place: int, error: BadRowError) -> None:
            if place // count not in bad:
                bad.add(place // count)
                self.bad.add(error, rows[indices[place // count]][1])

        for number, index in enumerate(indices):
            row, where = rows[index][1], rows.place(index)
            if rows.fills_nulls:
                row = {column: without_nulls(value) for column, value in row.items()}
            columns = self.settings.columns
            row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
            found: tuple[Record | None, ...] = (None,) * count
            try:
                found = self.records(row, where)
            except BadRowError as error:
                on_bad(count * number, error)
            records += found
            places += [f"{where}, {column}" for column in self.answers]
        encoded = self.encode(records, places, on_bad)
        return [
            None if number in bad else encoded[count * number : count * (number + 1)] for number in range(len(indices))
        ]

    def _group(
        self, rows: Rows, index: int, encoded: list[list[Encoded]], account: Account, long: LongRows
    ) -> RowGroup | None:
        """A row; None if it is dropped, which is counted."""
        where, (number, row) = rows.place(index), rows[index]
        if max(map(len, encoded)) > 1:
            error = BadRowError(
                "the template rewrites earlier turns of an answer with several, so it is no single row",
                reason="an answer of several turns that the template rewrites",
                where=where,
                hint="let the answers be one turn each, or set data.labels: last",
            )
            self.bad.add(error, row)
            return None
        if not all(encoded):
            account.without_label += 1
            return None
        examples = tuple(example_of(number, parts[0]) for parts in encoded)
        if not _differ(examples):
            self.bad.add(self.same(where), row)
            return None
        limited = self._limited(examples, where, account, long)
        if limited is None:
            return None
        columns = self.settings.columns
        try:
            return self.group(limited, {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}})
        except BadRowError as error:
            self.bad.add(error, row)
            return None

    def _limited(
        self, examples: tuple[Example, ...], where: str, account: Account, long: LongRows
    ) -> tuple[Example, ...] | None:
        """At most ``data.max_length`` tokens an answer; None if the row is dropped, which is counted."""
        limit, way = self.settings.max_length, self.settings.long_rows
        longest = max(map(len, examples))
        labels = sum(example.label_count for example in examples)
        if longest > limit and way == "error":
            long.add(where, longest)
            return None
        if longest > limit and way == "drop":
            account.dropped_long += 1
            account.labels_dropped += labels
            return None
        shortened = tuple(example.shortened(limit) for example in examples)
        account.labels_cut += labels - sum(example.label_count for example in shortened)
        if not all(example.label_count for example in shortened) or not _differ(shortened):
            account.without_label += 1  # nothing is left that tells the answers apart
            return None
        if longest > limit:
            account.cut += 1
            account.tokens_cut += sum(map(len, examples)) - sum(map(len, shortened))
        return shortened


def _differ(examples: tuple[Example, ...]) -> bool:
    """Whether no two answers of a row are the same tokens."""
    return len({key_of(example) for example in examples}) == len(examples)


# ---- preferences


_PAIR_COLUMNS = ("chosen", "rejected")
_CAN_USE = ("prompt", "system", "tools")


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
        key=_pair_key,
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
    return pairs, _with_longest(evaluated(pairs, report, _pair_key), pairs)


def records_of(row: Row, where: str) -> tuple[Record, Record]:
    """The chosen and the rejected answer of a row, each with the prompt.

    Raises:
        BadRowError: a value is missing or has the wrong type, or the answers have nothing to tell them apart.
    """
    for column in _PAIR_COLUMNS:
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
    chosen, rejected = (read_pair({**row, "completion": row[column]}, where) for column in _PAIR_COLUMNS)
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

    needs = answers = _PAIR_COLUMNS
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


def _pair_key(pair: RowGroup) -> bytes:
    return b"".join(key_of(row) for row in pair.rows)


def _with_longest(report: Report, pairs: Sequence[RowGroup]) -> Report:
    """The report with the longest answer's tokens, prompt included, in place of the longest pair's."""
    return replace(report, longest=max(len(row) for pair in pairs for row in pair.rows))


# ---- Rows with one answer each, and whether it is desired, become examples for a loss of unpaired answers (KTO).
#
# The form is TRL's: ``prompt``, ``completion`` and ``label`` (true or false). Each row comes with a second one,
# its prompt with the answer of another row, of which the loss estimates how far the model has moved. It knows
# neither models nor batches.


_UNPAIRED_COLUMNS = ("prompt", "completion", "label")
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
        key=_unpaired_key,
        read_apart=lambda name: _read_file(name, settings, tokenizer, reader.bad, say),
    )
    if len(train) < 2:
        raise UserError(
            "a single row to train on gives no other row's answer, of which kto estimates how far the model has moved",
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

    needs = _UNPAIRED_COLUMNS
    answers = ("completion",)
    form = "unpaired answers"
    noun = "an answer"

    def records(self, row: Row, where: str) -> tuple[Record, ...]:
        for column in _UNPAIRED_COLUMNS:
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
    reference: str, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, bad: BadRows | None, say: Say
) -> tuple[list[RowGroup], Report]:
    reader = _UnpairedReader(settings, tokenizer, BadRows(settings.bad_rows) if bad is None else bad, say)
    rows = reader.open(reference)
    answers, _, report = reader.read(rows, range(len(rows)))
    return answers, evaluated(answers, report, _unpaired_key)


def _prompts(answers: Sequence[RowGroup]) -> list[Hashable]:
    """The prompt of each answer, so that those to one prompt are all trained on or all held out; nothing
    where all have the same."""
    rows = [group.rows[0] for group in answers]
    prompts: list[Hashable] = [row.tokens[: row.prompt_length].tobytes() for row in rows]
    return prompts if len(set(prompts)) > 1 else [None] * len(rows)


def _unpaired_key(group: RowGroup) -> bytes:
    return key_of(group.rows[0]) + bytes([bool(group.rows[0].desired)])
