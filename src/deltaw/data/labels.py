"""Labeled rows become examples: text or images with a class, or text with a number.

Knows neither models nor batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.check import Finding
from deltaw.data.classes import LabelColumns, class_name, class_numbers, empty_label, find_columns, number
from deltaw.data.example import LabeledExample
from deltaw.data.messages import empty_text, written_text
from deltaw.data.mixture import Train, shown
from deltaw.data.pieces import Piece, pieces
from deltaw.data.pixels import AnyExample, ImageExample, image_rows, read_images
from deltaw.data.report import BadRowError, Report, similar_classes
from deltaw.data.row_files import OnBad
from deltaw.data.row_reader import RowReader, RunData, ShownExample
from deltaw.data.rows import Row, Rows
from deltaw.data.settings import DataSettings
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.data.images import ImageEncoder

# A class with less than this share of the largest one's rows is rare.
_RARE = 0.1


# A row's token ids and, for pairs of texts, which text each token belongs to.
_Tokens = tuple[np.ndarray, np.ndarray | None]


class LabelReader(RowReader[AnyExample]):
    """Reads labeled texts or images.

    Args:
        task: ``sequence-classification``, ``regression`` or ``image-classification``.
        classes: of an already trained model, in the order of its outputs.
        encoder: of images, which must all come to one size; without one they are not checked.
        labeled: False to read rows for prediction, whose labels are ignored.

    Attributes:
        classes: those given or, after the first file, those found; None for a regression.
    """

    noun = "a labeled row"
    form = "labeled rows"
    same = "with the same content and label as an earlier one"
    torn = "with content that has another label elsewhere"
    torn_hint = "if one label is right, correct the others"

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: PreTrainedTokenizerBase | None,
        task: str,
        *,
        classes: Sequence[str] | None = None,
        encoder: ImageEncoder | None = None,
        labeled: bool = True,
    ) -> None:
        super().__init__(settings, tokenizer)
        self.labeled = labeled
        self.predicts = ("prediction",) if task == "regression" else ("prediction", "probabilities")
        self.task = task
        self._reads_images = task == "image-classification"
        self.classes = None if classes is None else tuple(classes)
        self._encoder = encoder
        self._other_files = self._other_classes = 0
        self._columns = LabelColumns("label")
        self._labels: dict[int, int | float] = {}

    def read_source(self, reference: str, on_bad: OnBad | None) -> Rows:
        if not self._reads_images:
            return super().read_source(reference, on_bad)
        rows, others = image_rows(reference, on_bad, max_bytes=self.settings.max_row_bytes, labeled=self.labeled)
        self._other_files += others
        return rows

    def used_columns(self) -> set[str | None]:
        return {*self._columns.used()}

    def key(self, item: AnyExample) -> bytes:
        return item.digest + repr(item.label).encode()

    def content(self, item: AnyExample) -> bytes:
        return item.digest

    def prepared(self, seed: int = 0) -> RunData:
        found = super().prepared(seed)
        self._check_variety(found.train)
        source = shown(self.settings.train)
        self._check_sizes(found.train, source)
        self._check_sizes(found.held_out, found.report.held_out_source or source)
        return found

    def file(self, reference: str) -> tuple[Sequence[Any], Report]:
        examples, report = super().file(reference)
        self._check_sizes(examples, reference)
        return examples, report

    def _check_sizes(self, examples: Sequence[AnyExample], source: str) -> None:
        if self._encoder is not None:
            self._encoder.check(examples, source)

    def _check_variety(self, train: Sequence[AnyExample]) -> None:
        """Raise a UserError if all training rows have the same label."""
        label = train[0].label
        if all(example.label == label for example in train):
            what = f"the number {label:g}" if self.classes is None else f"the class '{self.classes[int(label)]}'"
            hint = "add rows with other labels, or hold out fewer rows with data.eval"
            raise UserError(f"all training rows have {what}", where=shown(self.settings.train), hint=hint)

    def _read(self, train: Train, seed: int | None = None) -> tuple[list[AnyExample], list[Any], Report]:
        self._other_files = 0
        examples, groups, report = super()._read(train, seed)
        sizes = np.array([example.size for example in examples if isinstance(example, ImageExample)])
        if (sizes != sizes[:1]).any():
            (low_height, low_width), (height, width) = sizes.min(0).tolist(), sizes.max(0).tolist()
            report = replace(report, image_sizes=(low_height, low_width, height, width))
        return examples, groups, replace(report, other_files=self._other_files, other_classes=self._other_classes)

    def told(self, report: Report, items: Sequence[AnyExample]) -> Report:
        if self.classes is None:
            return report
        counts = np.bincount([int(example.label) for example in items], minlength=len(self.classes)).tolist()
        return replace(report, class_counts=dict(zip(self.classes, counts, strict=True)))

    def usable(self, rows: Rows, chosen: Sequence[int]) -> Sequence[int]:
        """The rows that have a label, of a class that is wanted; their labels are kept."""
        self._columns = columns = find_columns(rows, self.settings, self.task, labeled=self.labeled)
        if not self.labeled:
            self._labels = dict.fromkeys(chosen, 0)
            return chosen
        if self._reads_images:
            self.form = "labeled images"
        else:
            self.form = "labeled pairs of texts" if columns.text_pair else "labeled text"
        kept: list[int] = []
        found: list[Any] = []
        given = self.classes if self.classes is not None else self.settings.classes
        drop = bool(given) and self.settings.other_classes == "drop"
        for index in chosen:
            value, where = rows[index][1].get(columns.label), rows.place(index)
            try:
                if self.task == "regression":
                    found.append(number(value, columns.label, where))
                else:
                    name = class_name(value, columns.label, where)
                    if name is None and self.bad.mode == "skip" and not drop:
                        raise empty_label(where)
                    found.append(name)
            except BadRowError as error:
                self.skip(rows, index, error)
                continue
            kept.append(index)
        if self.task != "regression":
            places = [rows.place(index) for index in kept]
            self.classes, found = class_numbers(  # type: ignore[assignment]
                found, places, self.settings, source=rows.name, trained=self.classes
            )
        self._labels = {index: label for index, label in zip(kept, found, strict=True) if label is not None}
        self._other_classes = len(kept) - len(self._labels)
        return list(self._labels)

    def examples(self, rows: Rows, indices: Sequence[int]) -> Iterator[AnyExample | None]:
        if self._reads_images:
            labels = [int(self._labels[index]) for index in indices]
            yield from read_images(rows, indices, self._columns, labels, lambda k, e: self.skip(rows, indices[k], e))
            return
        if not indices:
            return
        tokenize = _Tokenizing(self.tokenizer, self.settings.max_length, self._columns)
        read = lambda index: tokenize.texts(rows[index][1], rows.place(index))  # noqa: E731
        for found in self.encoded(rows, indices, read, tokenize):
            yield found and self._text(rows, *found, tokenize)

    def _text(
        self, rows: Rows, index: int, text: tuple[str, ...], tokens: _Tokens, tokenize: _Tokenizing
    ) -> LabeledExample | None:
        """A text of at most ``data.max_length`` tokens; None if it is skipped or dropped, which is counted."""
        where, length = rows.place(index), len(tokens[0])
        if not self.is_kept(where, [length]):
            return None
        if length > self.settings.max_length:
            (tokens,) = tokenize([text], cut=True)
        ids, segments = tokens
        if len(ids) <= tokenize.special:  # a tokenizer may drop characters
            self.skip(rows, index, empty_text("the text", where))
            return None
        return LabeledExample(rows.number(index), ids, self._labels[index], segments)

    def show(self, row: Any, item: AnyExample) -> ShownExample:
        label = self.classes[int(item.label)] if self.classes else f"{item.label:g}"
        if isinstance(item, ImageExample):
            height, width = item.size
            return ShownExample(1, 1, (Piece(f"an image of {height}×{width} pixels", False, False, 1),), label)
        assert self.tokenizer is not None
        return ShownExample(len(item), 1, tuple(pieces(item.tokens, [False] * len(item), self.tokenizer)), label)

    def findings(self, items: Sequence[AnyExample], report: Report) -> list[Finding]:
        """Classes with few rows."""
        counts = report.class_counts
        most = max(counts.values(), default=0)
        rare = [f"{name} ({count:,})" for name, count in counts.items() if 2 <= count < most * _RARE]
        single = [name for name, count in counts.items() if count < 2]
        hint = "a classifier may never answer with them; add rows of them, or drop some of the others"
        few = f"classes with less than {_RARE:.0%} of the rows of the largest: {', '.join(rare[:12])}"
        none = f"classes with fewer than 2 rows: {', '.join(single[:12])}"
        similar = similar_classes(counts)
        alike = f"classes that may be typing errors: {'; '.join(similar[:5])}"
        return [
            Finding("similar_classes", "warning", len(similar), alike, "correct the labels if they are the same class"),
            Finding("unbalanced", "warning", len(rare), few, hint),
            Finding("classes_without_rows", "warning", len(single), none, hint),
        ]


class _Tokenizing:
    """Texts, or pairs of them, to the tokens that the model expects, special tokens included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, limit: int, columns: LabelColumns) -> None:
        if tokenizer is None:
            raise UserError("the model has no tokenizer", where="model", hint="copy its tokenizer.json into its folder")
        self._tokenizer = tokenizer
        self._limit = limit
        self._columns = [column for column in (columns.text, columns.text_pair) if column]
        self.special = special = tokenizer.num_special_tokens_to_add(pair=len(self._columns) == 2)
        if special >= limit:
            what = f"data.max_length is {limit}, and the tokenizer adds {special} special tokens to each row"
            raise UserError(what, where="data.max_length", hint=f"set it to at least {special + 1}")

    def texts(self, row: Row, where: str) -> tuple[str, ...]:
        """The one or two texts of a row."""
        return tuple(written_text(row.get(column), column, where) for column in self._columns)

    def __call__(self, texts: Sequence[tuple[str, ...]], *, cut: bool = False) -> list[_Tokens]:
        return tokenized(self._tokenizer, texts, self._limit if cut else None)


def tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], limit: int | None = None
) -> list[_Tokens]:
    """Each row's token ids and, for pairs, which text each token belongs to.

    Args:
        limit: tokens at most, special ones included; None: of any length.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    # The tokenizer truncates, so it keeps its special tokens and shortens the longer text of a pair.
    limits = {} if limit is None else {"truncation": "longest_first", "max_length": limit}
    encoded = tokenizer(*columns, return_attention_mask=False, verbose=False, **limits)  # type: ignore[arg-type]
    segments = encoded.get("token_type_ids") if len(columns) == 2 else None
    ids = [np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]
    if segments is None:
        return [(row, None) for row in ids]
    return [(row, np.asarray(s, dtype=np.int8)) for row, s in zip(ids, segments, strict=True)]
