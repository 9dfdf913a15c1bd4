"""A run's data before the run: what is wrong with it, and what single rows become.

It reads rows as a run does, and needs the model's tokenizer but none of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltaw.data.chat_template import with_chat_template
from deltaw.data.check import Check, check_facts, collect
from deltaw.data.check_tasks import check_labeled, check_pairs, check_unpaired
from deltaw.data.chunk import Account, ChunkReader
from deltaw.data.example import Example, RowGroup
from deltaw.data.formats import choose_form
from deltaw.data.labels import AnyExample, LabeledExample, prepare_label_file
from deltaw.data.mixture import shown, sources_of
from deltaw.data.packing import Piece, pieces
from deltaw.data.preferences import prepare_pair_file, prepare_unpaired_file
from deltaw.data.report import BadRows, Report
from deltaw.data.reward_pairs import reward_examples
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings, held_out_reference
from deltaw.data.sources import open_source
from deltaw.data.templates import Encoder
from deltaw.errors import UserError
from deltaw.host.choices import choose_device, choose_precision
from deltaw.hub.folders import config_folder
from deltaw.hub.gguf import terminators_in
from deltaw.settings import RunConfig
from deltaw.training.callbacks import Say, silent
from deltaw.training.tasks.base import Task, task_of
from deltaw.training.tasks.causal import PreferenceTask
from deltaw.training.tasks.labels import LabelTask

# Longer than any row.
_UNLIMITED = 2**30


@dataclass(frozen=True)
class ShownExample:
    """One example of a row.

    Attributes:
        tokens, labels: how many. pieces: its text.
        label: of a labeled row, the class or the number.
    """

    tokens: int
    labels: int
    pieces: tuple[Piece, ...]
    label: str | None = None


@dataclass(frozen=True)
class ShownRow:
    """One row of a file and what it becomes.

    Attributes:
        row: its number. where: its place. examples: none if it is not used.
        notes: what happens to it, if not just one example comes of it.
    """

    row: int
    where: str
    examples: tuple[ShownExample, ...]
    notes: tuple[str, ...] = ()


def check_data(config: RunConfig, say: Say = silent) -> Check:
    """Check all rows that a run would train and evaluate on.

    Raises:
        UserError: the data cannot be read at all, or the settings do not fit it.
    """
    task, settings = _opened(config, say)
    source, apart = shown(settings.train), _held_out_files(settings)
    if task.has_labels:
        assert isinstance(task, LabelTask)
        if task.are_pairs(settings.train, settings):
            return _check_pairs(task, settings, source, apart)
        return _check_labeled(task, settings, source, apart)
    tokenizer = task.tokenizer
    assert tokenizer is not None  # a task without labels reads text
    if task.has_pairs:
        assert isinstance(task, PreferenceTask)
        if task.settings.is_unpaired:
            return _check_unpaired(task, settings, source, apart)
        return _check_pairs(task, settings, source, apart)
    ends = terminators_in(_folder(config, say), tokenizer)
    names = {end: str(tokenizer.convert_ids_to_tokens(end)) for end in ends}
    facts = collect(settings.train, settings, tokenizer, ends)
    held_out = [(name, collect(name, settings, tokenizer, ends)) for name in apart]
    return check_facts(facts, settings, source, end_names=names, held_out=held_out)


def shown_rows(config: RunConfig, first: int | None, count: int, say: Say = silent) -> Iterator[ShownRow]:
    """Rows of the training data and what they become.

    Args:
        first: the number of the first row, as in messages; None for the first in the file.
        count: how many rows.

    Raises:
        UserError: the data cannot be read, or has no row of that number.
    """
    task, settings = _opened(config, say)
    if task.has_pairs or (isinstance(task, LabelTask) and task.are_pairs(settings.train, settings)):
        rows = _shown_pairs(task, settings)
    else:
        rows = _shown_labeled(task, settings) if task.has_labels else _shown_texts(task, settings)
    given = 0
    for row in rows:
        if first is not None and row.row < first and not given:
            continue
        if first is not None and not given and row.row > first:
            break
        yield row
        given += 1
        if given == count:
            return
    if not given:
        raise UserError(
            f"there is no row {first}",
            where=shown(settings.train),
            hint="rows are counted from 1; in JSON Lines, the number is that of the line",
        )


def _opened(config: RunConfig, say: Say) -> tuple[Task, DataSettings]:
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    task = task_of(
        config.task,
        config.model,
        dtype,
        trust_remote_code=config.trust_remote_code,
        say=say,
        preference=config.preference,
    )
    if task.tokenizer is not None and not task.has_labels:
        task.tokenizer = with_chat_template(task.tokenizer, config.data.chat_template)
    return task, config.data


def _held_out_files(settings: DataSettings) -> list[str]:
    """The separate files that are evaluated on."""
    given = settings.eval
    shares = list(given.values()) if isinstance(given, Mapping) else [given]
    return [file for file in map(held_out_reference, shares) if file is not None]


def _folder(config: RunConfig, say: Say) -> Path:
    dtype = choose_precision(choose_device(config.device).value, config.precision).value
    return config_folder(config.model, dtype, config.trust_remote_code, say=say)


# Text


def _shown_texts(task: Task, settings: DataSettings) -> Iterator[ShownRow]:
    tokenizer = task.tokenizer
    assert tokenizer is not None  # a task without labels reads text
    encoder = Encoder(tokenizer, settings.template, settings.labels, settings.date)
    for source in sources_of(settings.train):
        stream = open_source(source.reference, BadRows("skip").add_unreadable, max_bytes=settings.max_row_bytes)
        stream.scan()
        own = replace(settings, columns=settings.columns if source.columns is None else source.columns)
        for chunk in stream.chunks():
            form = choose_form(chunk, source.form or settings.form, own.columns)
            for index in range(len(chunk)):
                reader = _Reader(encoder, form, own)
                yield reader.shown(chunk, index, task)


class _Reader:
    """Reads single rows, and says what became of each."""

    def __init__(self, encoder: Encoder, form: object, settings: DataSettings) -> None:
        self._settings = settings
        self._bad = BadRows("skip")
        refuses = settings.long_rows == "error"
        limits = replace(settings, max_length=_UNLIMITED) if refuses else settings
        self._reader = ChunkReader(encoder, form, limits, self._bad)  # type: ignore[arg-type]

    def shown(self, rows: Rows, index: int, task: Task) -> ShownRow:
        """The row at ``index``."""
        assert task.tokenizer is not None
        (examples,) = self._reader.read(rows, [index])
        found = []
        for example in examples:
            parts = tuple(pieces(example.tokens, example.is_label, task.tokenizer))
            found.append(ShownExample(len(example), example.label_count, parts))
        return ShownRow(rows.number(index), rows.place(index), tuple(found), tuple(self._notes(examples)))

    def _notes(self, examples: list[Example]) -> Iterator[str]:
        account, limit = self._reader.account, self._settings.max_length
        for line in self._bad.lines():
            done = "refused" if self._settings.bad_rows == "error" else "skipped"
            yield f"{done}: {line['error']}"
        if any(len(example) > limit for example in examples):
            yield f"refused: longer than data.max_length ({limit:,} tokens)"
        yield from _notes_of(account, limit)


def _notes_of(account: Account, limit: int) -> Iterator[str]:
    if account.unrolled:
        yield f"{account.unrolled_examples} examples, since the template rewrites earlier turns"
    if account.split:
        yield f"divided into {account.split_examples} examples of at most {limit:,} tokens"
    if account.cut:
        lost = f"{account.tokens_cut:,} lost, {account.labels_cut:,} of them labels"
        yield f"truncated to {limit:,} tokens: {lost}"
    if account.dropped_long:
        lost = f"{account.labels_dropped:,} labels lost"
        yield f"dropped: longer than data.max_length ({limit:,} tokens), {lost}"
    if account.without_label:
        yield "dropped: no label"
    if account.trailing_turns:
        yield "truncated after the assistant's last turn: nothing answers what follows"


# Pairs


def _check_pairs(task: Task, settings: DataSettings, source: str, apart: Sequence[str]) -> Check:
    bad = BadRows("skip")
    pairs, report = _read_pairs(task, settings, settings.train, bad)
    held_out = [(name, _read_pairs(task, settings, name, BadRows("skip"))[0]) for name in apart]
    return check_pairs(pairs, replace(report, source=source), bad, settings, held_out)


def _check_unpaired(task: PreferenceTask, settings: DataSettings, source: str, apart: Sequence[str]) -> Check:
    bad = BadRows("skip")
    answers, report = _read_pairs(task, settings, settings.train, bad)
    held_out = [(name, _read_pairs(task, settings, name, BadRows("skip"))[0]) for name in apart]
    weights = task.settings.desirable_weight, task.settings.undesirable_weight
    return check_unpaired(answers, replace(report, source=source), bad, settings, held_out, weights)


def _read_pairs(task: Task, settings: DataSettings, train: object, bad: BadRows) -> tuple[list[RowGroup], Report]:
    """Groups of rows as their task reads them, of any length."""
    assert task.tokenizer is not None
    whole = replace(settings, bad_rows="skip", long_rows="cut", max_length=_UNLIMITED)
    read: Any = prepare_pair_file
    if task.has_labels:
        read = reward_examples
    elif isinstance(task, PreferenceTask) and task.settings.is_unpaired:
        read = prepare_unpaired_file
    groups, report = read(train, whole, task.tokenizer, bad)
    return list(groups), report


def _shown_pairs(task: Task, settings: DataSettings) -> Iterator[ShownRow]:
    assert task.tokenizer is not None
    for pair in _read_pairs(task, settings, settings.train, BadRows("skip"))[0]:
        found = []
        unpaired = pair.rows[0].desired
        for row in pair.rows if unpaired is None else pair.rows[:1]:
            parts = tuple(pieces(row.tokens, row.is_label, task.tokenizer))
            found.append(ShownExample(len(row), row.label_count, parts))
        long = max(map(len, pair.rows)) > settings.max_length
        notes = ["the chosen answer, then the rejected one"]
        if unpaired is not None:
            notes = ["desired" if unpaired else "not desired"]
        if long:
            notes.append(f"longer than data.max_length ({settings.max_length:,} tokens): {settings.long_rows}")
        where = f"{shown(settings.train)}, row {pair.row}"
        yield ShownRow(pair.row, where, tuple(found), tuple(notes))


# Labels


def _check_labeled(task: Task, settings: DataSettings, source: str, apart: Sequence[str]) -> Check:
    bad = BadRows("skip")
    examples, report = _read_labeled(task, settings, settings.train, None, bad)
    classes = tuple(report.class_counts) or None
    held_out = [(name, _read_labeled(task, settings, name, classes, BadRows("skip"))[0]) for name in apart]
    return check_labeled(examples, replace(report, source=source), bad, settings, held_out)


def _read_labeled(
    task: Task, settings: DataSettings, train: object, classes: tuple[str, ...] | None, bad: BadRows
) -> tuple[list[AnyExample], Report]:
    whole = replace(settings, bad_rows="skip", long_rows="cut", max_length=_UNLIMITED)
    tokenizer = None if task.name == "image-classification" else task.tokenizer
    return prepare_label_file(train, whole, tokenizer, task.name, classes, bad)  # type: ignore[arg-type]


def _shown_labeled(task: Task, settings: DataSettings) -> Iterator[ShownRow]:
    bad = BadRows("skip")
    examples, report = _read_labeled(task, settings, settings.train, None, bad)
    names = list(report.class_counts)
    for example in examples:
        label = names[int(example.label)] if names else f"{example.label:g}"
        if isinstance(example, LabeledExample) and task.tokenizer is not None:
            parts = tuple(pieces(example.tokens, [False] * len(example), task.tokenizer))
            shown_example = ShownExample(len(example), 1, parts, label)
            long = len(example) > settings.max_length
        else:
            height, width = getattr(example, "size", (0, 0))
            text = f"an image of {height}×{width} pixels"
            shown_example = ShownExample(1, 1, (Piece(text, False, False, 1),), label)
            long = False
        note = f"longer than data.max_length ({settings.max_length:,} tokens): {settings.long_rows}"
        where = f"{shown(settings.train)}, row {example.row}"
        yield ShownRow(example.row, where, (shown_example,), (note,) if long else ())
