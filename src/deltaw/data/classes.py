"""Columns of labeled rows, and the conversion of labels to class indices or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.data.columns import IMAGES, LABELED_TEXTS, LABELS, TEXT_PAIRS, listed
from deltaw.data.formats import check_columns
from deltaw.data.report import BadRowError
from deltaw.data.settings import DataSettings
from deltaw.data.sources import NumberedRows
from deltaw.errors import UserError, did_you_mean

NO_LABEL = "a label that is no class or number"
# Maximum number of inferred classes, if at least half of the rows have a distinct value.
_MAX_CLASSES = 50


@dataclass(frozen=True)
class LabelColumns:
    """Columns of labeled rows. Either ``text``, ``image`` or ``pixels`` (one column per pixel) is set."""

    label: str
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    pixels: tuple[str, ...] = ()

    def used(self) -> set[str]:
        columns = (self.label, self.text, self.text_pair, self.image, *self.pixels)
        return {column for column in columns if column is not None}


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
    text, pair = columns.get("text"), columns.get("text_pair")
    if text is None:
        pair_names = next((both for both in TEXT_PAIRS if set(both) <= set(available)), None)
        if "text" in available or pair_names is None:
            text = _find_column(rows, available, "text", LABELED_TEXTS)
        else:
            text, pair = pair_names[0], pair or pair_names[1]
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


def regression_label(value: object, column: str, location: str) -> float:
    """Return the label of a regression row.

    Raises:
        BadRowError: if it is not a finite number.
    """
    try:
        result = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        description = "empty" if value is None or value == "" else repr(value)
        hint = "write a number, remove the row, or name the right column in data.columns: {label: …}"
        message = f"'{column}' must be a finite number but is {description}"
        raise BadRowError(message, reason=NO_LABEL, location=location, hint=hint)
    return result


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
    configured = tuple(trained) if trained is not None else tuple(settings.classes or ())
    drop = bool(configured) and settings.other_classes == "drop"
    for name, location in zip(names, locations, strict=True):
        if drop or (name in configured if configured else name is not None):
            continue
        if name is None:
            raise empty_label(location)
        message = f"the label '{name}' " + ("is not in data.classes" if trained is None else "was not seen in training")
        hint = f"the classes are {listed(configured)}; data.other_classes: drop drops rows of other classes"
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
