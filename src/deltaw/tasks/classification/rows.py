"""Readers of labeled rows: texts or images with a class, texts with a number, and answer pairs of reward models.

Answer pairs are rows of :mod:`deltaw.tasks.preference.rows`, with an optional ``margin`` between the answers. With a
chat template or ``data.template: plain``, tokens are those of a language model. Otherwise prompt and answer are the two
texts of a pair, with the special tokens of the tokenizer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaw.data.bad_rows import BadRowError, BadRows, OnBad, OnBadRow
from deltaw.data.class_names import match_classes, merge_setting
from deltaw.data.data_findings import DataFinding, class_findings
from deltaw.data.example import MAX_TEXT_LENGTH, Example, LabeledExample, RowGroup, TokenSpan, token_spans
from deltaw.data.formats import Pair, Record, check_columns
from deltaw.data.messages import WRONG_TYPE, Conversation, cell_text, empty_text
from deltaw.data.pixels import AnyExample, ImageExample, LabelColumns, image_rows, read_images
from deltaw.data.prompts import read_prompt_row
from deltaw.data.report import LabelNumbers, PreparationReport
from deltaw.data.row_reader import ExamplePreview, RowReader, RunData
from deltaw.data.row_selection import ReadResult
from deltaw.data.rows import NumberedRows, Row
from deltaw.data.sources import open_source
from deltaw.data.starter import TaskStarter
from deltaw.data.templates import Encoded
from deltaw.errors import UserError, did_you_mean
from deltaw.settings.columns import listed
from deltaw.settings.data import DataSettings
from deltaw.settings.mixture import Train, format_sources, sources_of
from deltaw.settings.row_kinds import IMAGES, LABELED_TEXTS, LABELS, PAIR_COLUMNS, TEXT_PAIRS
from deltaw.tasks.preference.rows import PairReader, are_preferences

NO_LABEL = "a label that is no class or number"
# Distance of an outlier from the median, in median distances.
_OUTLIER = 20.0
# Maximum number of inferred classes, if at least half of the rows have a distinct value.
_MAX_CLASSES = 50


def find_columns(rows: NumberedRows, settings: DataSettings, task: str, *, labeled: bool = True) -> LabelColumns:
    """Return the columns that ``data.columns`` names, or columns with common names.

    Args:
        labeled: False if the rows need no label.

    Raises:
        UserError: if a column is not found. The message lists the columns of the file.
    """
    columns = settings.columns
    check_columns(rows, columns)
    available = [column for column in rows.columns if column not in columns.values() and column != settings.group]
    if task == "image-classification":
        label = columns.get("label") or _find_column(rows, available, "label", LABELS, required=False)
        image = columns.get("image") or _find_column(rows, available, "image", IMAGES, required=False)
        tables = rows.tables()
        square = math.isqrt(len(rows.columns)) ** 2 == len(rows.columns)
        if label is None and tables and not tables[0].has_header and (labeled or not square):
            label = rows.columns[-1]  # a table of numbers without header: pixels, then the label
        if label is None and labeled:
            raise _missing_column(rows, "label", LABELS)
        label = label or "label"
        if image is not None:
            return LabelColumns(label, image=image)
        if not tables:
            raise _missing_column(rows, "image", IMAGES)
        return LabelColumns(label, pixels=tuple(column for column in available if column != label))
    text = columns.get("text")
    pair = columns.get("text_pair")
    if text is None:
        pair_names = next((both for both in TEXT_PAIRS if set(both) <= set(available)), None)
        if "text" in available or pair_names is None:
            text = _find_column(rows, available, "text", LABELED_TEXTS)
        else:
            text = pair_names[0]
            pair = pair or pair_names[1]
    if pair is None and "text_pair" in available:
        pair = "text_pair"
    if not labeled:
        return LabelColumns("label", text, pair)
    available = [column for column in available if column not in (text, pair)]
    label_names = (*LABELS, *(("score",) if task == "regression" else ()))
    label = columns.get("label") or _find_column(rows, available, "label", label_names) or label_names[0]
    return LabelColumns(label, text, pair)


def class_name(value: object, column: str, location: str) -> str | None:
    """Return the name of a class as text, or None if the cell is empty.

    Raises:
        BadRowError: if the value is a list, an object or a fraction.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str | int):
        return str(value)
    if isinstance(value, float):
        hint = "set task: regression to predict numbers, or data.columns: {label: …} to the right column"
        raise BadRowError(f"'{column}' is {value}, which is not a class", reason=NO_LABEL, location=location, hint=hint)
    message = f"'{column}' is a {type(value).__name__}, not one class"
    raise BadRowError(message, reason=NO_LABEL, location=location, hint="give each row one class, text or an integer")


def regression_label(value: object, column: str, location: str) -> float | tuple[float, ...]:
    """Return the label of a regression row: a number, or a tuple for a list of several targets.

    Raises:
        BadRowError: if a number is not finite in fp32.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a table
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if isinstance(value, list) and value and not any(isinstance(part, list | tuple) for part in value):
        numbers = [regression_label(part, column, location) for part in value]
        return tuple(number for number in numbers if isinstance(number, float)) if len(numbers) > 1 else numbers[0]
    try:
        result = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not abs(result) <= float(np.finfo(np.float32).max):
        description = "empty" if value is None or value == "" else repr(value)
        hint = "write a number, remove the row, or name the right column in data.columns: {label: …}"
        message = f"'{column}' must be a finite number but is {description}"
        raise BadRowError(message, reason=NO_LABEL, location=location, hint=hint)
    return result


def other_targets(count: int, expected: int, location: str) -> BadRowError:
    """Return the error for a row with another number of targets than the first one."""
    message = f"the row has {count} numbers as label, and the first row has {expected}"
    return BadRowError(message, reason=NO_LABEL, location=location, hint="write the same targets in each row")


def format_label(label: float | tuple[float, ...]) -> str:
    """Return the target or targets of a row as text."""
    return ", ".join(f"{value:g}" for value in np.atleast_1d(label))


def label_numbers(labels: Sequence[float | tuple[float, ...]]) -> tuple[LabelNumbers, ...]:
    """Return a description of each target. Empty without labels."""
    columns = np.asarray(labels, np.float64).reshape(len(labels), -1).T if labels else ()
    return tuple(LabelNumbers(*map(float, (c.mean(), c.std(), c.min(), c.max()))) for c in columns)


def constant_target(labels: Sequence[float | tuple[float, ...]]) -> str:
    """Return a message if a target has the same number in all rows, rounded to fp32. Otherwise an empty string."""
    for index, numbers in enumerate(described := label_numbers(labels), 1):
        if np.float32(numbers.minimum) == np.float32(numbers.maximum):
            target = "" if len(described) == 1 else f" as target {index}"
            return f"all rows have the number {numbers.minimum:g}{target}"
    return ""


def number_findings(items: Sequence[AnyExample]) -> list[DataFinding]:
    """Return findings about the numbers of a regression."""
    labels = [item.label for item in items]
    values = np.asarray(labels, np.float64).reshape(len(labels), -1)
    distances = np.abs(values - np.median(values, 0))
    typical = np.median(distances, 0)
    is_outlier = (distances > _OUTLIER * typical) & (typical > 0)
    outliers = [items[index] for index in np.flatnonzero(is_outlier.any(1)).tolist()]
    examples = "; ".join(f"row {item.row}: {format_label(item.label)}" for item in outliers[:5])
    text = f"labels very far from the others: {examples}"
    hint = "squared errors of such rows dominate the loss; check them, or train on the logarithm of the labels"
    message = constant_target(labels)
    return [
        DataFinding("constant_labels", "error", int(bool(message)), message, "add rows with other labels"),
        DataFinding("outliers", "warning", len(outliers), text, hint),
    ]


def class_numbers(
    names: Sequence[str | None],
    locations: Sequence[str],
    settings: DataSettings,
    *,
    source: str,
    trained: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], list[int | None]]:
    """Return the classes in the order of the model's outputs, and the class index of each row.

    Args:
        names: Class of each row, or None if the row has no class.
        locations: Location of each row, for messages.
        source: File name, for messages.
        trained: Classes of a trained model, which override ``data.classes``.

    Returns:
        The classes, and the class index of each row. The index is None if the row should be dropped
        (``data.other_classes``).

    Raises:
        UserError: if a class is unknown, if the data has a single class, or if the column does not contain classes.
    """
    configured = tuple(trained) if trained is not None else settings.class_names
    drop = bool(configured) and settings.other_classes == "drop"
    for name, location in zip(names, locations, strict=True):
        if drop or (name in configured if configured else name is not None):
            continue
        if name is None:
            raise empty_label(location)
        message = f"the label '{name}' " + ("is not in data.classes" if trained is None else "was not seen in training")
        hint = f"the classes are {listed(configured)}; data.other_classes: drop drops rows of other classes"
        if similar := match_classes({name}, configured):
            hint += f". {merge_setting(similar)} merges it"
        raise UserError(message, location=location, hint=hint)
    classes = configured or _sorted({name for name in names if name is not None})
    if not configured:
        _check_inferred(classes, len(names), source)
    numbers = {name: index for index, name in enumerate(classes)}
    if drop and trained is None:
        present = set(names)
        missing = [name for name in classes if name not in present]
        if missing:
            unknown = _sorted({name for name in names if name is not None and name not in numbers})
            hint = did_you_mean(missing[0], unknown)
            raise UserError(f"no row has the class '{missing[0]}'", location=f"data.classes for {source}", hint=hint)
    return classes, [None if name is None else numbers.get(name) for name in names]


def empty_label(location: str) -> BadRowError:
    """Return the error for a row without a class."""
    hint = "write its class, or remove the row"
    return BadRowError("the label is empty", reason="an empty label", location=location, hint=hint)


def check_classes(num_labels: int, classes: Sequence[str], location: str) -> None:
    """Raise a UserError if the model's head does not have one output per class.

    Args:
        num_labels: Number of outputs, as in the model's ``config.num_labels``.
        location: Name of the model, for the message.
    """
    if num_labels != len(classes):
        message = f"the model's head has {num_labels} outputs, but there are {len(classes)} classes: {listed(classes)}"
        hint = "list the head's classes in its order in data.classes, or use a model without a head"
        raise UserError(message, location=location, hint=hint)


def _check_inferred(classes: Sequence[str], rows: int, source: str) -> None:
    if len(classes) < 2:
        message = f"all rows have the class '{classes[0]}'" if classes else "no row has a label"
        raise UserError(message, location=source, hint="a classifier needs rows of at least two classes")
    if len(classes) > max(_MAX_CLASSES, rows // 2):
        hint = "set task: regression for numbers, name another column in data.columns: {label: …}, or list data.classes"
        raise UserError(f"the labels have {len(classes):,} values in {rows:,} rows", location=source, hint=hint)


def _sorted(names: set[str]) -> tuple[str, ...]:
    """Sort names by value if all are numbers, else alphabetically."""
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _find_column(
    rows: NumberedRows, available: Sequence[str], role: str, common_names: Sequence[str], *, required: bool = True
) -> str | None:
    """Return the column with the preferred name, or else the only column with another common name."""
    if common_names[0] in available:
        return common_names[0]
    candidates = [name for name in common_names[1:] if name in available]
    if len(candidates) == 1 or not (candidates or required):
        return candidates[0] if candidates else None
    if candidates:
        hint = f"choose one in data.columns: {{{role}: {candidates[0]}}}"
        raise UserError(f"several columns may be the {role}: {listed(candidates)}", location=rows.name, hint=hint)
    raise _missing_column(rows, role, common_names)


def _missing_column(rows: NumberedRows, role: str, common_names: Sequence[str]) -> UserError:
    message = f"no column for the {role} was found"
    hint = f"name it in data.columns: {{{role}: …}}; columns named {listed(common_names)} are found automatically"
    return UserError(message, location=f"{rows.name}, whose columns are {listed(rows.columns)}", hint=hint)


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltaw.data.images import ImageEncoder

# Share of the largest class's rows below which a class is rare.
_RARE = 0.1


class LabelStarter(TaskStarter):
    """Starter of tasks with labels."""

    def form(self, rows: NumberedRows, columns: Mapping[str, str]) -> str:
        return "images" if self.reads_images else "labeled text"

    def reader(
        self, rows: NumberedRows, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None
    ) -> RowReader[Any]:
        if are_preferences(rows):
            return RewardReader(settings, tokenizer)
        return LabelReader(settings, tokenizer, self.entry.name)

    def labels(self, rows: NumberedRows, columns: Mapping[str, str]) -> list[object] | None:
        if are_preferences(rows) and not self.reads_images:
            return None
        settings = DataSettings(train=rows.name, columns=dict(columns))
        label = find_columns(rows, settings, self.entry.name).label
        return [row.get(label) for _, row in rows]


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
        self._matched_labels: dict[str, str] = {}
        self._columns = LabelColumns("label")
        self._labels: dict[int, Any] = {}

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
        if not self._reads_images:  # reports show evaluation rows only
            data = replace(data, train=[replace(example, text="") for example in data.train])
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
        """Raise a UserError if all training rows have the same class, or the same number for a target."""
        message = ""
        if self.classes is None:
            message = constant_target([example.label for example in train])
        elif all(example.label == train[0].label for example in train):
            message = f"all rows have the class '{self.classes[int(train[0].label)]}'"
        if message:
            hint = "add rows with other labels, or hold out fewer rows with data.eval"
            raise UserError(message, location=format_sources(self.settings.train), hint=hint)

    def read(self, train: Train, seed: int | None = None) -> ReadResult:
        self._num_other_files = 0
        read = super().read(train, seed)
        report = read.report
        sizes = np.array([example.size for example in read.rows if isinstance(example, ImageExample)])
        if (sizes != sizes[:1]).any():
            low_height, low_width = sizes.min(0).tolist()
            height, width = sizes.max(0).tolist()
            report = replace(report, image_sizes=(low_height, low_width, height, width))
        report = replace(
            report,
            other_files=self._num_other_files,
            other_classes=self._num_other_classes,
            matched_labels=self._matched_labels,
        )
        return replace(read, report=report)

    def add_counts(self, report: PreparationReport, items: Sequence[AnyExample]) -> PreparationReport:
        if self.classes is None:
            return replace(report, label_numbers=label_numbers([example.label for example in items]))
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
        classes = self.classes if self.classes is not None else self.settings.class_names
        drop = bool(classes) and self.settings.other_classes == "drop"
        for index in chosen:
            value = rows[index][1].get(columns.label)
            location = rows.row_location(index)
            try:
                if self.task == "regression":
                    label = regression_label(value, columns.label, location)
                    if labels and np.size(label) != np.size(labels[0]):
                        raise other_targets(np.size(label), np.size(labels[0]), location)
                    labels.append(label)
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
            labels = self._merge_labels(labels)
            locations = [rows.row_location(index) for index in labeled_indices]
            self.classes, labels = class_numbers(
                labels, locations, self.settings, source=rows.name, trained=self.classes
            )
        self._labels = {index: label for index, label in zip(labeled_indices, labels, strict=True) if label is not None}
        self._num_other_classes = len(labeled_indices) - len(self._labels)
        return list(self._labels)

    def _merge_labels(self, labels: Sequence[str | None]) -> list[str | None]:
        """Return the class of each label: that of ``data.classes``, or a known class with an almost equal name."""
        mapping = self.settings.class_of_label
        names = [label and mapping.get(label, label) for label in labels]
        if self.classes is None:
            return names
        matched = self._matched_labels = match_classes({name for name in names if name}, self.classes)
        return [name and matched.get(name, name) for name in names]

    def examples(self, rows: NumberedRows, indices: Sequence[int]) -> Iterator[AnyExample | None]:
        if self._reads_images:
            labels = [int(self._labels[index]) for index in indices]
            yield from read_images(rows, indices, self._columns, labels, lambda k, e: self.skip(rows, indices[k], e))
            return
        if not indices:
            return
        tokenize = _Tokenizing(self.tokenizer, self.settings.max_length, self._columns)
        read = functools.partial(self.read_row, rows)
        for row in self.encode_rows(rows, indices, read, tokenize):
            yield row and self._text(rows, *row, tokenize)

    def read_row(self, rows: NumberedRows, index: int) -> tuple[str, ...]:
        """Return the text or the two texts of a row."""
        row = rows[index][1]
        location = rows.row_location(index)
        return tuple(cell_text(row.get(column), column, location) for column in self._columns.texts())

    def _text(
        self, rows: NumberedRows, index: int, text: tuple[str, ...], tokens: _Tokens, tokenize: _Tokenizing
    ) -> LabeledExample | None:
        """Build the example of a text. Return None if it is skipped or dropped (and counted)."""
        location = rows.row_location(index)
        length = len(tokens[0])
        if not self.check_length(location, [length]):
            return None
        if length > self.settings.max_length:
            (tokens,) = tokenize([text], cut=True)
        ids, segments = tokens
        if len(ids) <= tokenize.special:  # tokenizers may remove characters
            self.skip(rows, index, empty_text("the text", location))
            return None
        shown = "\n".join(text)[:MAX_TEXT_LENGTH]
        return LabeledExample(rows.number(index), ids, self._labels[index], segments, shown)

    def show(self, row: Any, item: AnyExample) -> ExamplePreview:
        label = format_label(item.label) if self.classes is None else self.classes[int(item.label)]
        if isinstance(item, ImageExample):
            height, width = item.size
            return ExamplePreview(1, 1, (TokenSpan(f"an image of {height}×{width} pixels", False, False, 1),), label)
        assert self.tokenizer is not None
        return ExamplePreview(len(item), 1, tuple(token_spans(item.tokens, [False] * len(item), self.tokenizer)), label)

    def findings(self, items: Sequence[AnyExample], report: PreparationReport) -> list[DataFinding]:
        """Report classes with a small number of rows, and numbers that are constant or outliers."""
        if self.classes is None and items:
            return number_findings(items)
        counts = report.class_counts
        largest = max(counts.values(), default=0)
        rare = [f"{name} ({count:,})" for name, count in counts.items() if 2 <= count < largest * _RARE]
        single = [name for name, count in counts.items() if count < 2]
        hint = "a classifier may never predict them; add rows of these classes, or drop some of the others"
        rare_text = f"classes with less than {_RARE:.0%} of the rows of the largest: {', '.join(rare[:12])}"
        single_text = f"classes with fewer than 2 rows: {', '.join(single[:12])}"
        return [
            *class_findings(counts),
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
        self.special = special = tokenizer.num_special_tokens_to_add(pair=len(columns.texts()) == 2)
        if special >= limit:
            message = f"data.max_length is {limit}, and the tokenizer adds {special} special tokens to each row"
            raise UserError(message, location="data.max_length", hint=f"set it to at least {special + 1}")

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
    encoded = tokenizer(*columns, return_attention_mask=False, verbose=False, **limits)
    segments = encoded.get("token_type_ids") if len(columns) == 2 else None
    ids = [np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]
    if segments is None:
        return [(row, None) for row in ids]
    return [(row, np.asarray(s, dtype=np.int8)) for row, s in zip(ids, segments, strict=True)]


@dataclass(frozen=True, eq=False)
class RewardPair(RowGroup):
    """Two answers as inputs of a classifier, the chosen one first.

    Attributes:
        rows: :class:`deltaw.data.example.LabeledExample` with the margin as label. While rows are read,
            :class:`deltaw.data.example.Example`.
        margin: Desired difference between the scores of the chosen and the rejected answer.
    """

    margin: float = 0.0

    @property
    def label_count(self) -> int:
        """Return 1, the number of labels of a pair."""
        return 1


def are_pairs(train: Train, settings: DataSettings) -> bool:
    """Return True if the first source has columns for a chosen and a rejected answer."""
    columns = settings.columns
    if "label" in columns or "text" in columns:
        return False
    if set(PAIR_COLUMNS) <= set(columns):
        return True
    source = sources_of(train)[0].reference
    max_bytes = settings.max_row_bytes
    stream = open_source(source, BadRows("skip").add, max_bytes=max_bytes)
    stream.scan()
    return set(PAIR_COLUMNS) <= (set(stream.columns) - set(columns.values())) | set(columns)


class RewardReader(PairReader):
    """Reads files of answer pairs for a classifier."""

    can_use = (*PairReader.can_use, "margin")
    predicts: tuple[str, ...] = ("score_chosen", "score_rejected")

    def encode(
        self, records: Sequence[Record | None], locations: Sequence[str], on_bad: OnBadRow
    ) -> list[list[Encoded]]:
        if self.encoder.chat or self.settings.template == "plain":
            return super().encode(records, locations, on_bad)
        result: list[list[Encoded]] = [[] for _ in records]
        numbers = [number for number, record in enumerate(records) if record is not None]
        if not numbers:
            return result
        texts = [_texts(record) for record in records if record is not None]
        assert self.tokenizer is not None
        encoded = self.tokenizer(
            [prompt for prompt, _ in texts], [answer for _, answer in texts], return_attention_mask=False, verbose=False
        )
        for position, (number, ids) in enumerate(zip(numbers, encoded["input_ids"], strict=True)):
            answer_start = next((n for n, text in enumerate(encoded.sequence_ids(position)) if text == 1), len(ids))
            if answer_start < len(ids):  # the labels are all tokens after the prompt
                result[number].append(Encoded(list(ids), [(answer_start, len(ids))], answer_start, texts[position][1]))
        return result

    def group(self, examples: tuple[Example, ...], row: Row, location: str) -> RowGroup:
        return RewardPair(examples, _margin(row.get("margin"), location))

    def finalize(self, items: Sequence[RowGroup], seed: int) -> list[RewardPair]:
        """Convert pairs to inputs of a classifier."""
        pairs = []
        for pair in items:
            assert isinstance(pair, RewardPair)
            rows = tuple(to_labeled_example(row, pair.margin) for row in pair.rows)
            pairs.append(RewardPair(rows, pair.margin))
        return pairs


class AnswerScoreReader(RewardReader):
    """Reads single answers with their prompts, for scoring by a reward model."""

    needs = ()  # type: ignore[assignment]
    answers = ("answer",)  # type: ignore[assignment]
    predicts = ("score",)

    def records(self, row: Row, location: str) -> tuple[Record, ...]:
        record, has_answer = read_prompt_row(row, location)
        if not has_answer:
            hint = "name it 'completion', or map it with data.columns: {completion: …}"
            raise BadRowError("the row has no answer", reason="no answer", location=location, hint=hint)
        return (record,)


def _texts(record: Record) -> tuple[str, str]:
    """Return prompt and answer of a record as two texts. In a conversation, the answer is the last message."""
    if isinstance(record, Pair):
        return "\n".join(filter(None, [record.system, record.prompt])), record.completion
    assert isinstance(record, Conversation)  # pairs cannot be plain text
    *context, last = [str(message.get("content") or "") for message in record.messages]
    return "\n".join(context), last


def _margin(value: object, location: str) -> float:
    """Return the margin of a row, 0 by default.

    Raises:
        BadRowError: if it is not a finite number.
    """
    if value is None:
        return 0.0
    try:
        margin = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        margin = math.inf
    if isinstance(value, bool) or not math.isfinite(margin):
        message = f"'margin' must be a number but is {str(value)[:40]!r}"
        raise BadRowError(message, reason=WRONG_TYPE, location=location, hint="leave the column out for a margin of 0")
    return margin


def to_labeled_example(row: Example, margin: float) -> LabeledExample:
    """Return an answer with its prompt as input of a classifier. Segment ids are 1 for the answer."""
    segments = np.zeros(len(row), np.int8)
    segments[row.prompt_length :] = 1
    return LabeledExample(row.row, row.tokens, margin, segments)
