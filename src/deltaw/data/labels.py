"""Labeled rows become examples: text or images with a class, or text with a number.

Report, limits, duplicates and splits are those of rows for causal models (:mod:`deltaw.data.prepare`). It
knows neither models nor batches.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deltaw.data.chunk import LongRows
from deltaw.data.classes import LabelColumns, class_name, class_numbers, empty_label, find_columns, number
from deltaw.data.messages import text_of
from deltaw.data.mixture import Train, shown, sources_of
from deltaw.data.pixels import ImageExample, image_rows, read_images
from deltaw.data.report import BadRowError, BadRows, Report
from deltaw.data.rows import Rows
from deltaw.data.settings import DataSettings
from deltaw.data.sources import check_group, choose, divide, evaluated, groups_of, read_rows
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 4096  # rows tokenized at once


@dataclass(frozen=True, eq=False)
class LabeledExample:
    """The tokens of one row, special tokens included, and its label.

    Attributes:
        row: number of the row in its file, from 1.
        tokens: int32 (length,).
        label: index of the class, or the number of a regression.
        segments: int8 (length,), which of the two texts each token belongs to; None for one text, or if the
            tokenizer does not say.
    """

    row: int
    tokens: np.ndarray
    label: int | float
    segments: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def label_count(self) -> int:
        return 1

    def key(self) -> bytes:
        """Equal for duplicates: rows with the same tokens, segments and label."""
        digest = hashlib.blake2b(self.tokens.tobytes(), digest_size=16)
        digest.update(repr(self.label).encode())
        if self.segments is not None:
            digest.update(self.segments.tobytes())
        return digest.digest()


AnyExample = LabeledExample | ImageExample


@dataclass(frozen=True)
class PreparedLabels:
    """Examples to train on, examples held out, the report on all rows, and the classes.

    ``classes`` are in the order of the model's outputs; None for a regression. ``skipped`` are rows that
    cannot be used.
    """

    train: list[AnyExample]
    held_out: list[AnyExample]
    report: Report
    classes: tuple[str, ...] | None
    skipped: BadRows


def prepare_labeled(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str,
    *,
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> PreparedLabels:
    """Read the labeled data of a run.

    Args:
        settings: the ``data:`` section.
        tokenizer: of the model to be trained; images need none.
        task: ``sequence-classification``, ``regression`` or ``image-classification``.
        seed: for choosing rows (``rows``) and holding rows out.
        classes: of an already trained model, in the order of its outputs.

    Raises:
        UserError: the data cannot be used; the message names the file and the row.
    """
    reader = _Reader(settings, tokenizer, task, None if classes is None else tuple(classes))
    rows, others = reader.open(settings.train)
    check_group(rows.name, rows.columns, settings.group)
    examples, kept, report = reader.read(rows, choose(len(rows), settings.rows, seed))
    found = reader.classes
    train, held_out, report = divide(
        examples,
        groups_of(rows, kept, settings.group),
        replace(report, other_files=others),
        settings,
        seed=seed,
        key=_key,
        read_apart=lambda name: prepare_label_file(name, settings, tokenizer, task, found, reader.bad),
    )
    _check_variety(train, found, shown(settings.train))
    return PreparedLabels(train, held_out, _with_counts(report, train, found), found, reader.bad)


def prepare_label_file(
    reference: str,
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str,
    classes: Sequence[str] | None,
    bad: BadRows | None = None,
) -> tuple[list[AnyExample], Report]:
    """Read one file as evaluation data, with all its rows, duplicates included.

    Args:
        classes: of the model that is evaluated, in the order of its outputs; None for a regression.
        bad: also told of rows that cannot be used.

    Raises:
        UserError: the data cannot be used, or a label is none of the classes; the message names file and row.
    """
    reader = _Reader(settings, tokenizer, task, None if classes is None else tuple(classes), bad)
    rows, others = reader.open(reference)
    examples, _, report = reader.read(rows, range(len(rows)))
    report = evaluated(examples, replace(report, other_files=others), _key)
    return examples, _with_counts(report, examples, reader.classes)


class _Reader:
    """Reads files of one task; ``classes`` are those given or, after the first file, those found."""

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        task: str,
        classes: tuple[str, ...] | None,
        bad: BadRows | None = None,
    ) -> None:
        if settings.long_rows == "split":
            raise UserError(
                "a labeled row cannot be divided: its label is one of all of it",
                where="data.long_rows: split",
                hint="set it to cut or drop",
            )
        self.bad = BadRows(settings.bad_rows) if bad is None else bad
        self._known: Counter[str] = Counter()
        self.settings = settings
        self.tokenizer = tokenizer
        self.task = task
        self.classes = classes

    def open(self, train: Train) -> tuple[Rows, int]:
        """The rows, and how many files of an image folder are not images."""
        found = []
        self._known = self.bad.counts.copy()
        on_bad = self.bad.add_unreadable if self.bad.mode == "skip" else None
        most = self.settings.max_row_bytes
        for source in sources_of(train):
            if source.weight != 1 or source.columns is not None or source.form is not None:
                raise UserError(
                    "a source of labeled rows has no weight, columns or form of its own",
                    where=f"data.train, {source.reference}",
                    hint="name the sources alone: data.train: [a.csv, b.csv]",
                )
            is_image = self.task == "image-classification"
            if is_image:
                found.append(image_rows(source.reference, on_bad, max_bytes=most))
            else:
                found.append((read_rows(source.reference, on_bad, max_bytes=most), 0))
        if len(found) == 1:
            return found[0]
        return Rows.joined(shown(train), [rows for rows, _ in found]), sum(others for _, others in found)

    def read(self, rows: Rows, chosen: Sequence[int]) -> tuple[list[AnyExample], list[int], Report]:
        """The usable rows among ``chosen`` as examples, their indices in ``rows``, and the report."""
        columns = find_columns(rows, self.settings, self.task)
        unreadable = len(self.bad) - self._known.total()
        chosen_rows = len(chosen)
        chosen, labels = self._labels(rows, chosen, columns)
        pairs = [(index, label) for index, label in zip(chosen, labels, strict=True) if label is not None]
        if not pairs:
            raise _nothing_left(rows, 0)
        usable = [index for index, _ in pairs]
        used = columns.used() | {self.settings.group}
        report = Report(
            source=rows.name,
            form="labeled images",
            template="",
            rows_read=len(rows) + unreadable,
            rows_kept=len(usable),
            not_chosen=len(rows) - chosen_rows,
            other_classes=len(chosen) - len(usable),
            unused_columns=tuple(column for column in rows.columns if column not in used),
        )
        kept = [label for _, label in pairs]
        if self.task == "image-classification":
            examples, usable, report = self._images(rows, usable, kept, columns, report)
        else:
            examples, usable, report = self._texts(rows, usable, kept, columns, report)
        return examples, usable, replace(report, bad_rows=dict(self.bad.counts - self._known))

    def _images(
        self, rows: Rows, usable: Sequence[int], labels: Sequence[int | float], columns: LabelColumns, report: Report
    ) -> tuple[list[AnyExample], list[int], Report]:
        numbers = [int(label) for label in labels]
        found = read_images(rows, usable, columns, numbers, lambda k, e: self._skip(rows, usable[k], e))
        images = [image for image in found if image is not None]
        if not images:
            raise _nothing_left(rows, 0)
        kept = [index for index, image in zip(usable, found, strict=True) if image is not None]
        sizes = np.array([image.size for image in images])
        if (sizes != sizes[0]).any():
            low, high = sizes.min(0).tolist(), sizes.max(0).tolist()
            report = replace(report, image_sizes=(low[0], low[1], high[0], high[1]))
        return list(images), kept, replace(report, rows_kept=len(images))

    def _labels(
        self, rows: Rows, chosen: Sequence[int], columns: LabelColumns
    ) -> tuple[list[int], list[int | float | None]]:
        """The rows at ``chosen`` that have a label, and their labels; None for a class that is not wanted."""
        kept: list[int] = []
        names: list[str | None] = []
        numbers: list[int | float | None] = []
        given = self.classes if self.classes is not None else self.settings.classes
        drop = bool(given) and self.settings.other_classes == "drop"
        for index in chosen:
            value, where = rows[index][1].get(columns.label), rows.place(index)
            try:
                if self.task == "regression":
                    numbers.append(number(value, columns.label, where))
                else:
                    name = class_name(value, columns.label, where)
                    if name is None and self.bad.mode == "skip" and not drop:
                        raise empty_label(where)
                    names.append(name)
            except BadRowError as error:
                self._skip(rows, index, error)
                continue
            kept.append(index)
        if self.task == "regression":
            return kept, numbers
        places = [rows.place(index) for index in kept]
        self.classes, classes = class_numbers(names, places, self.settings, source=rows.name, trained=self.classes)
        return kept, list(classes)

    def _skip(self, rows: Rows, index: int, error: BadRowError) -> None:
        self.bad.add(error, rows[index][1])

    def _texts(
        self, rows: Rows, usable: Sequence[int], labels: Sequence[int | float], columns: LabelColumns, report: Report
    ) -> tuple[list[AnyExample], list[int], Report]:
        limit, long_rows = self.settings.max_length, self.settings.long_rows
        tokenize = _Tokenizing(self.tokenizer, limit, columns)
        examples: list[AnyExample] = []
        kept: list[int] = []
        long = LongRows()
        cut = tokens_cut = 0
        for start in range(0, len(usable), _CHUNK):
            texts: list[tuple[int, int | float, tuple[str, ...]]] = []
            for index, label in zip(usable[start : start + _CHUNK], labels[start : start + _CHUNK], strict=True):
                try:
                    texts.append((index, label, tokenize.texts(rows, index)))
                except BadRowError as error:
                    self._skip(rows, index, error)
            tokens = tokenize([text for _, _, text in texts]) if texts else []
            for (index, label, text), (ids, segments) in zip(texts, tokens, strict=True):
                if len(ids) > limit:
                    long.add(rows.place(index), len(ids))
                    if long_rows != "cut":
                        continue
                    cut, tokens_cut = cut + 1, tokens_cut + len(ids) - limit
                    ids, segments = tokenize([text], cut=True)[0]
                if not len(ids):
                    where = rows.place(index)
                    empty = BadRowError("the text is empty", reason="an empty text", where=where, hint="remove the row")
                    self._skip(rows, index, empty)
                    continue
                examples.append(LabeledExample(rows.number(index), ids, label, segments))
                kept.append(index)
        if long.count and long_rows == "error":
            raise long.error(limit, can_split=False)
        if not examples:
            raise _nothing_left(rows, long.count)
        report = replace(
            report,
            form="labeled pairs of texts" if columns.text_pair else "labeled text",
            rows_kept=len(examples),
            cut=cut,
            tokens_cut=tokens_cut,
            dropped_long=long.count if long_rows == "drop" else 0,
        )
        return examples, kept, report


class _Tokenizing:
    """Texts, or pairs of them, to the tokens that the model expects, special tokens included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, limit: int, columns: LabelColumns) -> None:
        if tokenizer is None:
            raise UserError(
                "the model's folder holds no tokenizer", where="model", hint="copy its tokenizer.json into it"
            )
        self._tokenizer = tokenizer
        self._limit = limit
        self._columns = [column for column in (columns.text, columns.text_pair) if column]
        special = tokenizer.num_special_tokens_to_add(pair=len(self._columns) == 2)
        if special >= limit:
            raise UserError(
                f"data.max_length is {limit}, and the tokenizer adds {special} special tokens to each row",
                where="data.max_length",
                hint=f"set it to at least {special + 1}",
            )

    def texts(self, rows: Rows, index: int) -> tuple[str, ...]:
        """The one or two texts of a row."""
        row, where = rows[index][1], rows.place(index)
        return tuple(text_of(row.get(column), column, where) for column in self._columns)

    def __call__(
        self, texts: Sequence[tuple[str, ...]], *, cut: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Each row's token ids and, for pairs, which text each token belongs to."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        # The tokenizer truncates, so it keeps its special tokens and shortens the longer text of a pair.
        limits = {"truncation": "longest_first", "max_length": self._limit} if cut else {}
        encoded = self._tokenizer(*columns, return_attention_mask=False, verbose=False, **limits)  # type: ignore[arg-type]
        segments = encoded.get("token_type_ids") if len(columns) == 2 else None
        ids = [np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]
        if segments is None:
            return [(row, None) for row in ids]
        return [(row, np.asarray(s, dtype=np.int8)) for row, s in zip(ids, segments, strict=True)]


def _key(example: AnyExample) -> bytes:
    return example.key()


def _with_counts(report: Report, examples: Sequence[AnyExample], classes: tuple[str, ...] | None) -> Report:
    if classes is None:
        return report
    counts = np.bincount([int(example.label) for example in examples], minlength=len(classes)).tolist()
    return replace(report, class_counts=dict(zip(classes, counts, strict=True)))


def _check_variety(train: Sequence[AnyExample], classes: tuple[str, ...] | None, source: str) -> None:
    """Raise a UserError if all training rows have the same label."""
    if len({example.label for example in train}) < 2:
        label = train[0].label
        what = f"the number {label:g}" if classes is None else f"the class '{classes[int(label)]}'"
        raise UserError(
            f"all training rows have {what}",
            where=source,
            hint="add rows with other labels, or hold out fewer rows with data.eval",
        )


def _nothing_left(rows: Rows, dropped: int) -> UserError:
    return UserError(
        f"no row is left to train on: {dropped:,} are too long, and the others are of other classes or cannot be used",
        where=rows.name,
        hint="raise data.max_length, or check data.classes",
    )
