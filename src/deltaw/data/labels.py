"""Readers of labeled rows: texts or images with a class, or texts with a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.check import DataFinding
from deltaw.data.classes import LabelColumns, class_name, class_numbers, empty_label, find_columns, regression_label
from deltaw.data.example import LabeledExample
from deltaw.data.messages import cell_text, empty_text
from deltaw.data.mixture import Train, format_sources
from deltaw.data.pixels import AnyExample, ImageExample, image_rows, read_images
from deltaw.data.report import BadRowError, PreparationReport, similar_classes
from deltaw.data.row_files import OnBad
from deltaw.data.row_reader import ExamplePreview, RowReader, RunData
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.settings import DataSettings
from deltaw.data.token_spans import TokenSpan, token_spans
from deltaw.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.data.images import ImageEncoder

# Share of the largest class's rows below which a class is rare.
_RARE = 0.1


# Token ids of a row and, for text pairs, the index of the text that each token belongs to.
_Tokens = tuple[np.ndarray, np.ndarray | None]


class LabelReader(RowReader[AnyExample]):
    """Reads labeled texts or images.

    Args:
        task: ``sequence-classification``, ``regression`` or ``image-classification``.
        classes: Classes of a trained model, in the order of its outputs.
        encoder: Image encoder, used to check that all images have one size. None to skip this check.
        labeled: False to read rows for prediction and ignore their labels.

    Attributes:
        classes: ``classes``, or those of the first file. None if the task is regression.
    """

    noun = "a labeled row"
    form = "labeled rows"
    duplicate_text = "with the same content and label as an earlier one"
    contradiction_text = "with content that has another label elsewhere"
    contradiction_hint = "if one label is right, correct the others"

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
        self._num_other_files = self._num_other_classes = 0
        self._columns = LabelColumns("label")
        self._labels: dict[int, int | float] = {}

    def read_source(self, reference: str, on_bad: OnBad | None) -> NumberedRows:
        if not self._reads_images:
            return super().read_source(reference, on_bad)
        max_bytes = self.settings.max_row_bytes
        rows, num_others = image_rows(reference, on_bad, max_bytes=max_bytes, labeled=self.labeled)
        self._num_other_files += num_others
        return rows

    def used_columns(self) -> set[str | None]:
        return {*self._columns.used()}

    def key(self, item: AnyExample) -> bytes:
        return item.digest + repr(item.label).encode()

    def content(self, item: AnyExample) -> bytes:
        return item.digest

    def prepare(self, seed: int = 0) -> RunData:
        data = super().prepare(seed)
        self._check_variety(data.train)
        source = format_sources(self.settings.train)
        self._check_sizes(data.train, source)
        self._check_sizes(data.held_out, data.report.held_out_source or source)
        return data

    def file(self, reference: str) -> tuple[Sequence[Any], PreparationReport]:
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
            description = f"the number {label:g}" if self.classes is None else f"the class '{self.classes[int(label)]}'"
            hint = "add rows with other labels, or hold out fewer rows with data.eval"
            raise UserError(f"all rows have {description}", location=format_sources(self.settings.train), hint=hint)

    def _read(self, train: Train, seed: int | None = None) -> tuple[list[AnyExample], list[Any], PreparationReport]:
        self._num_other_files = 0
        examples, groups, report = super()._read(train, seed)
        sizes = np.array([example.size for example in examples if isinstance(example, ImageExample)])
        if (sizes != sizes[:1]).any():
            (low_height, low_width), (height, width) = sizes.min(0).tolist(), sizes.max(0).tolist()
            report = replace(report, image_sizes=(low_height, low_width, height, width))
        report = replace(report, other_files=self._num_other_files, other_classes=self._num_other_classes)
        return examples, groups, report

    def add_counts(self, report: PreparationReport, items: Sequence[AnyExample]) -> PreparationReport:
        if self.classes is None:
            return report
        counts = np.bincount([int(example.label) for example in items], minlength=len(self.classes)).tolist()
        return replace(report, class_counts=dict(zip(self.classes, counts, strict=True)))

    def select_usable(self, rows: NumberedRows, chosen: Sequence[int]) -> Sequence[int]:
        """Return the rows with a valid label, and store their labels."""
        self._columns = columns = find_columns(rows, self.settings, self.task, labeled=self.labeled)
        if not self.labeled:
            self._labels = dict.fromkeys(chosen, 0)
            return chosen
        if self._reads_images:
            self.form = "labeled images"
        else:
            self.form = "labeled pairs of texts" if columns.text_pair else "labeled text"
        labeled_indices: list[int] = []
        labels: list[Any] = []
        classes = self.classes if self.classes is not None else self.settings.classes
        drop = bool(classes) and self.settings.other_classes == "drop"
        for index in chosen:
            value, location = rows[index][1].get(columns.label), rows.row_location(index)
            try:
                if self.task == "regression":
                    labels.append(regression_label(value, columns.label, location))
                else:
                    name = class_name(value, columns.label, location)
                    if name is None and self.bad.mode == "skip" and not drop:
                        raise empty_label(location)
                    labels.append(name)
            except BadRowError as error:
                self.skip(rows, index, error)
                continue
            labeled_indices.append(index)
        if self.task != "regression":
            locations = [rows.row_location(index) for index in labeled_indices]
            self.classes, labels = class_numbers(  # type: ignore[assignment]
                labels, locations, self.settings, source=rows.name, trained=self.classes
            )
        self._labels = {index: label for index, label in zip(labeled_indices, labels, strict=True) if label is not None}
        self._num_other_classes = len(labeled_indices) - len(self._labels)
        return list(self._labels)

    def examples(self, rows: NumberedRows, indices: Sequence[int]) -> Iterator[AnyExample | None]:
        if self._reads_images:
            labels = [int(self._labels[index]) for index in indices]
            yield from read_images(rows, indices, self._columns, labels, lambda k, e: self.skip(rows, indices[k], e))
            return
        if not indices:
            return
        tokenize = _Tokenizing(self.tokenizer, self.settings.max_length, self._columns)
        read = lambda index: tokenize.texts(rows[index][1], rows.row_location(index))  # noqa: E731
        for row in self.encode_rows(rows, indices, read, tokenize):
            yield row and self._text(rows, *row, tokenize)

    def _text(
        self, rows: NumberedRows, index: int, text: tuple[str, ...], tokens: _Tokens, tokenize: _Tokenizing
    ) -> LabeledExample | None:
        """Build the example of a text. Return None if it is skipped or dropped (and counted)."""
        location, length = rows.row_location(index), len(tokens[0])
        if not self.check_length(location, [length]):
            return None
        if length > self.settings.max_length:
            (tokens,) = tokenize([text], cut=True)
        ids, segments = tokens
        if len(ids) <= tokenize.special:  # tokenizers may remove characters
            self.skip(rows, index, empty_text("the text", location))
            return None
        return LabeledExample(rows.number(index), ids, self._labels[index], segments)

    def show(self, row: Any, item: AnyExample) -> ExamplePreview:
        label = self.classes[int(item.label)] if self.classes else f"{item.label:g}"
        if isinstance(item, ImageExample):
            height, width = item.size
            return ExamplePreview(1, 1, (TokenSpan(f"an image of {height}×{width} pixels", False, False, 1),), label)
        assert self.tokenizer is not None
        return ExamplePreview(len(item), 1, tuple(token_spans(item.tokens, [False] * len(item), self.tokenizer)), label)

    def findings(self, items: Sequence[AnyExample], report: PreparationReport) -> list[DataFinding]:
        """Report classes with few rows."""
        counts = report.class_counts
        largest = max(counts.values(), default=0)
        rare = [f"{name} ({count:,})" for name, count in counts.items() if 2 <= count < largest * _RARE]
        single = [name for name, count in counts.items() if count < 2]
        hint = "a classifier may never predict them; add rows of these classes, or drop some of the others"
        rare_text = f"classes with less than {_RARE:.0%} of the rows of the largest: {', '.join(rare[:12])}"
        single_text = f"classes with fewer than 2 rows: {', '.join(single[:12])}"
        similar = similar_classes(counts)
        similar_text = f"classes that may be typing errors: {'; '.join(similar[:5])}"
        return [
            DataFinding("similar_classes", "warning", len(similar), similar_text, "merge them if they are the same"),
            DataFinding("unbalanced", "warning", len(rare), rare_text, hint),
            DataFinding("classes_without_rows", "warning", len(single), single_text, hint),
        ]


class _Tokenizing:
    """Converts texts, or text pairs, to tokens including special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, limit: int, columns: LabelColumns) -> None:
        if tokenizer is None:
            raise UserError("the model has no tokenizer", location="model", hint="copy tokenizer.json into its folder")
        self._tokenizer = tokenizer
        self._limit = limit
        self._columns = [column for column in (columns.text, columns.text_pair) if column]
        self.special = special = tokenizer.num_special_tokens_to_add(pair=len(self._columns) == 2)
        if special >= limit:
            message = f"data.max_length is {limit}, and the tokenizer adds {special} special tokens to each row"
            raise UserError(message, location="data.max_length", hint=f"set it to at least {special + 1}")

    def texts(self, row: Row, location: str) -> tuple[str, ...]:
        """Return the text or the two texts of a row."""
        return tuple(cell_text(row.get(column), column, location) for column in self._columns)

    def __call__(self, texts: Sequence[tuple[str, ...]], *, cut: bool = False) -> list[_Tokens]:
        return tokenize_texts(self._tokenizer, texts, self._limit if cut else None)


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, ...]], limit: int | None = None
) -> list[_Tokens]:
    """Return the token ids of each row and, for pairs, the index of the text that each token belongs to.

    Args:
        limit: Maximum number of tokens including special tokens. Without it, texts are not truncated.
    """
    columns = [list(column) for column in zip(*texts, strict=True)]
    # The tokenizer truncates, because it preserves special tokens and shortens the longer text of a pair.
    limits = {} if limit is None else {"truncation": "longest_first", "max_length": limit}
    encoded = tokenizer(*columns, return_attention_mask=False, verbose=False, **limits)  # type: ignore[arg-type]
    segments = encoded.get("token_type_ids") if len(columns) == 2 else None
    ids = [np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]
    if segments is None:
        return [(row, None) for row in ids]
    return [(row, np.asarray(s, dtype=np.int8)) for row, s in zip(ids, segments, strict=True)]
