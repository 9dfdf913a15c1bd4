"""Rows with a chosen and a rejected answer become pairs of examples with the same prompt.

The forms are TRL's: ``prompt``, ``chosen`` and ``rejected``, each text or messages; without ``prompt``, what
both answers begin with is the prompt. Report, limits, duplicates and splits are those of other rows; a pair
counts as one row. It knows neither models nor batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltaw.data.bad_rows import BadRowError, BadRows
from deltaw.data.chunk import Account, LongRows, example_of
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import Record, check_columns, read_pair
from deltaw.data.messages import WRONG_TYPE, without_nulls
from deltaw.data.mixture import Train, shown, sources_of
from deltaw.data.progress import Progress, Say, silent
from deltaw.data.report import Report
from deltaw.data.row_store import key_of
from deltaw.data.rows import Row, Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import read_rows
from deltaw.data.split import check_group, choose, divide, evaluated, groups_of
from deltaw.data.templates import Encoded, Encoder
from deltaw.errors import UserError, did_you_mean

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
    reader = _Reader(settings, tokenizer, BadRows(settings.bad_rows), say)
    rows = reader.open(settings.train)
    check_group(rows.name, rows.columns, settings.group)
    pairs, kept, report = reader.read(rows, choose(len(rows), settings.rows, seed))
    train, held_out, report = divide(
        pairs,
        groups_of(rows, kept, settings.group) if settings.group else _prompts(pairs),
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
    reader = _Reader(settings, tokenizer, BadRows(settings.bad_rows) if bad is None else bad, say)
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


class _Reader:
    """Reads files of pairs."""

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, bad: BadRows, say: Say
    ) -> None:
        refused = {
            "data.long_rows": (settings.long_rows == "split", "a pair cannot be divided", "cut or drop"),
            "data.form": (settings.form != "auto", "pairs have one form", "auto"),
        }
        for key, (is_refused, what, right) in refused.items():
            if is_refused:
                raise UserError(what, where=key, hint=f"set it to {right}")
        self.bad = bad
        self._settings = settings
        self._encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
        self._say = say
        self._known = bad.counts.copy()

    def open(self, train: Train) -> Rows:
        """All rows.

        Raises:
            UserError: they cannot be read, or have no pairs.
        """
        self._known = self.bad.counts.copy()
        on_bad = self.bad.add_unreadable if self.bad.mode == "skip" else None
        found = []
        for source in sources_of(train):
            if source.weight != 1 or source.columns is not None or source.form is not None:
                raise UserError(
                    "a source of pairs has no weight, columns or form of its own",
                    where=f"data.train, {source.reference}",
                    hint="name the sources alone: data.train: [a.jsonl, b.jsonl]",
                )
            found.append(read_rows(source.reference, on_bad))
            self._check_columns(found[-1])
        return found[0] if len(found) == 1 else Rows.joined(shown(train), found)

    def _check_columns(self, rows: Rows) -> None:
        columns = self._settings.columns
        check_columns(rows, columns)
        there = (set(rows.columns) - set(columns.values())) | set(columns)
        lacking = [column for column in _NEEDS if column not in there]
        if lacking:
            raise UserError(
                f"pairs need the column '{lacking[0]}'",
                where=f"{rows.name}, whose columns are {', '.join(map(repr, rows.columns))}",
                hint=f"{did_you_mean(lacking[0], rows.columns)}; map other names with data.columns: "
                "{chosen: …, rejected: …}",
            )

    def read(self, rows: Rows, chosen: Sequence[int]) -> tuple[list[RowGroup], list[int], Report]:
        """The usable rows among ``chosen`` as pairs, their indices in ``rows``, and the report.

        Raises:
            UserError: a row cannot be used, or none is left.
        """
        unreadable = len(self.bad) - self._known.total()
        account, long = Account(), LongRows()
        pairs: list[RowGroup] = []
        kept: list[int] = []
        progress = Progress(self._say, f"tokenizing {rows.name}", 0)
        for start in range(0, len(chosen), _CHUNK):
            part = list(chosen[start : start + _CHUNK])
            for index, encoded in zip(part, self._encoded(rows, part), strict=True):
                pair = None if encoded is None else self._pair(rows, index, encoded, account, long)
                if pair is not None:
                    pairs.append(pair)
                    kept.append(index)
            progress.at(start + len(part), 0)
        limit = self._settings.max_length
        if long.count:
            raise long.error(limit, can_split=False)
        skipped = self.bad.counts - self._known
        if not pairs:
            raise UserError(
                f"no pair is left: {account.dropped_long:,} are too long, {account.without_label:,} have an "
                f"answer without a label, {skipped.total():,} cannot be used",
                where=rows.name,
                hint="raise data.max_length, or check the answers",
            )
        columns = self._settings.columns
        used = {columns.get(name, name) for name in _NEEDS + _CAN_USE} | {self._settings.group}
        return (
            pairs,
            kept,
            Report(
                source=rows.name,
                form="preference pairs",
                template=self._encoder.template,
                rows_read=len(rows) + unreadable,
                rows_kept=len(pairs),
                not_chosen=len(rows) - len(chosen),
                unused_columns=tuple(column for column in rows.columns if column not in used),
                date=self._encoder.dated,
                bad_rows=dict(skipped),
                **account.as_dict(),
            ),
        )

    def _encoded(
        self, rows: Rows, indices: Sequence[int]
    ) -> list[tuple[list[Encoded], list[Encoded]] | None]:
        """The tokens of each row's answers; None for a row that cannot be used."""
        records: list[Record | None] = []
        places: list[str] = []
        bad: set[int] = set()

        def on_bad(place: int, error: BadRowError) -> None:
            if place // 2 not in bad:
                bad.add(place // 2)
                self.bad.add(error, rows[indices[place // 2]][1])

        for number, index in enumerate(indices):
            row, where = rows[index][1], rows.place(index)
            if rows.fills_nulls:
                row = {column: without_nulls(value) for column, value in row.items()}
            columns = self._settings.columns
            row = {**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}}
            found: tuple[Record | None, Record | None] = (None, None)
            try:
                found = records_of(row, where)
            except BadRowError as error:
                on_bad(2 * number, error)
            records += found
            places += [f"{where}, {column}" for column in _NEEDS]
        encoded = self._encoder.encode(records, places, on_bad)
        return [
            None if number in bad else (encoded[2 * number], encoded[2 * number + 1])
            for number in range(len(indices))
        ]

    def _pair(
        self,
        rows: Rows,
        index: int,
        encoded: tuple[list[Encoded], list[Encoded]],
        account: Account,
        long: LongRows,
    ) -> RowGroup | None:
        """A pair; None if it is dropped, which is counted."""
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
        if _key(RowGroup(examples[:1])) == _key(RowGroup(examples[1:])):
            self.bad.add(_same(where), row)
            return None
        return self._limited(examples, where, account, long)

    def _limited(
        self, examples: tuple[Example, ...], where: str, account: Account, long: LongRows
    ) -> RowGroup | None:
        """A pair of at most ``data.max_length`` tokens an answer; None if it is dropped, which is counted."""
        limit, way = self._settings.max_length, self._settings.long_rows
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
        first, second = shortened
        if not (first.label_count and second.label_count) or key_of(first) == key_of(second):
            account.without_label += 1  # nothing is left that tells the answers apart
            return None
        if longest > limit:
            account.cut += 1
            account.tokens_cut += sum(map(len, examples)) - sum(map(len, shortened))
        return RowGroup(shortened)


def _same(where: str) -> BadRowError:
    return BadRowError(
        "'chosen' and 'rejected' are the same",
        reason="the same answer twice",
        where=where,
        hint="remove the row: there is nothing to prefer",
    )


def _prompts(pairs: Sequence[RowGroup]) -> list[Hashable]:
    """The prompt of each pair, so that pairs of one prompt are all trained on or all held out; nothing where
    all have the same."""
    prompts: list[Hashable] = [pair.rows[0].tokens[: pair.rows[0].prompt_length].tobytes() for pair in pairs]
    return prompts if len(set(prompts)) > 1 else [None] * len(pairs)


def _key(pair: RowGroup) -> bytes:
    return b"".join(key_of(row) for row in pair.rows)


def _with_longest(report: Report, pairs: Sequence[RowGroup]) -> Report:
    """The report with the longest answer's tokens, prompt included, in place of the longest pair's."""
    return replace(report, longest=max(len(row) for pair in pairs for row in pair.rows))
