"""Which columns of a file hold text, image and label, and what a label means: a class, or a number.

It knows rows; not tokens, pixels or splits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.data.columns import IMAGES, LABELED_TEXTS, LABELS, TEXT_PAIRS, listed
from deltaw.data.formats import check_columns
from deltaw.data.report import BadRowError
from deltaw.data.settings import DataSettings
from deltaw.data.sources import Rows
from deltaw.errors import UserError, did_you_mean

NO_LABEL = "a label that is no class or number"
# A column with more values than this, most in one row only, is hardly one of classes.
_MANY = 50


@dataclass(frozen=True)
class LabelColumns:
    """The file's columns. ``text``, or ``image``, or ``pixels``: one column for each."""

    label: str
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    pixels: tuple[str, ...] = ()

    def used(self) -> set[str]:
        named = (self.label, self.text, self.text_pair, self.image, *self.pixels)
        return {column for column in named if column is not None}


def find_columns(rows: Rows, settings: DataSettings, task: str, *, labeled: bool = True) -> LabelColumns:
    """Return the columns that ``data.columns`` names, or columns with usual names.

    Args:
        labeled: False if the rows need no label.

    Raises:
        UserError: one is not found; the message lists the columns of the file.
    """
    columns = settings.columns
    check_columns(rows, columns)
    there = [column for column in rows.columns if column not in columns.values() and column != settings.group]
    if task == "image-classification":
        label = columns.get("label") or _named(rows, there, "label", LABELS, required=False)
        image = columns.get("image") or _named(rows, there, "image", IMAGES, required=False)
        tables = rows.tables()
        square = math.isqrt(len(rows.columns)) ** 2 == len(rows.columns)
        if label is None and tables and not tables[0].has_header and (labeled or not square):
            label = rows.columns[-1]  # a table of bare numbers: pixels, then the label
        if label is None and labeled:
            raise _unknown(rows, "label", LABELS)
        label = label or "label"
        if image is not None:
            return LabelColumns(label, image=image)
        if not tables:
            raise _unknown(rows, "image", IMAGES)
        return LabelColumns(label, pixels=tuple(column for column in there if column != label))
    text, pair = columns.get("text"), columns.get("text_pair")
    if text is None:
        known = next((both for both in TEXT_PAIRS if set(both) <= set(there)), None)
        if "text" in there or known is None:
            text = _named(rows, there, "text", LABELED_TEXTS)
        else:
            text, pair = known[0], pair or known[1]
    if pair is None and "text_pair" in there:
        pair = "text_pair"
    if not labeled:
        return LabelColumns("label", text, pair)
    there = [column for column in there if column not in (text, pair)]
    usual = (*LABELS, *(("score",) if task == "regression" else ()))
    return LabelColumns(columns.get("label") or _named(rows, there, "label", usual) or usual[0], text, pair)


def class_name(value: object, column: str, where: str) -> str | None:
    """A class's name as text; None if the cell is empty.

    Raises:
        BadRowError: the value is a list, an object or a fraction.
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
        raise BadRowError(f"'{column}' holds {value}, which is not a class", reason=NO_LABEL, where=where, hint=hint)
    what = f"'{column}' holds a {type(value).__name__}, not one class"
    raise BadRowError(what, reason=NO_LABEL, where=where, hint="give each row one class, as text or an integer")


def number(value: object, column: str, where: str) -> float:
    """A label of a regression.

    Raises:
        BadRowError: it is not a finite number.
    """
    try:
        result = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        shown = "empty" if value is None or value == "" else repr(value)
        hint = "write a number, remove the row, or name the right column in data.columns: {label: …}"
        raise BadRowError(f"'{column}' must be a finite number but is {shown}", reason=NO_LABEL, where=where, hint=hint)
    return result


def class_numbers(
    names: Sequence[str | None],
    places: Sequence[str],
    settings: DataSettings,
    *,
    source: str,
    trained: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], list[int | None]]:
    """The classes in the order of the model's outputs, and the index of each row's class.

    Args:
        names: the class of each row, None if it has none. places: where each row is, for messages.
        source: the file, for messages.
        trained: the classes of an already trained model; they override ``data.classes``.

    Returns:
        the classes, and for each row its class's index; None for a row to drop (``other_classes``).

    Raises:
        UserError: a class is unknown, there is only one, or the column does not look like classes.
    """
    given = tuple(trained) if trained is not None else tuple(settings.classes or ())
    drop = bool(given) and settings.other_classes == "drop"
    for name, where in zip(names, places, strict=True):
        if drop or (name in given if given else name is not None):
            continue
        if name is None:
            raise empty_label(where)
        what = f"the label '{name}' " + ("is not in data.classes" if trained is None else "was not seen in training")
        hint = f"the classes are {listed(given)}; data.other_classes: drop drops rows of others"
        raise UserError(what, where=where, hint=hint)
    classes = given or _sorted({name for name in names if name is not None})
    if not given:
        _check_found(classes, len(names), source)
    numbers = {name: index for index, name in enumerate(classes)}
    if drop and trained is None:
        found = set(names)
        lacking = [name for name in classes if name not in found]
        if lacking:
            others = _sorted({name for name in names if name is not None and name not in numbers})
            hint = did_you_mean(lacking[0], others)
            raise UserError(f"no row has the class '{lacking[0]}'", where=f"data.classes for {source}", hint=hint)
    return classes, [None if name is None else numbers.get(name) for name in names]


def empty_label(where: str) -> BadRowError:
    """What is said of a row that has no class."""
    hint = "write its class, or remove the row"
    return BadRowError("the label is empty", reason="an empty label", where=where, hint=hint)


def check_classes(num_labels: int, classes: Sequence[str], where: str) -> None:
    """Raise a UserError if the model's head does not have one output for each class.

    Args:
        num_labels: outputs of the head, as in the model's ``config.num_labels``.
        where: the model, for the message.
    """
    if num_labels != len(classes):
        what = f"the model's head has {num_labels} outputs, but there are {len(classes)} classes: {listed(classes)}"
        hint = "list the head's classes in its order in data.classes, or use a model without a head"
        raise UserError(what, where=where, hint=hint)


def _check_found(classes: Sequence[str], rows: int, source: str) -> None:
    if len(classes) < 2:
        what = f"all rows have the class '{classes[0]}'" if classes else "no row has a label"
        raise UserError(what, where=source, hint="a classifier needs rows of at least two classes")
    if len(classes) > max(_MANY, rows // 2):
        hint = "set task: regression for numbers, name another column in data.columns: {label: …}, or list data.classes"
        raise UserError(f"the labels have {len(classes):,} different values in {rows:,} rows", where=source, hint=hint)


def _sorted(names: set[str]) -> tuple[str, ...]:
    """In alphabetical order, or by value if all are numbers."""
    try:
        return tuple(sorted(names, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _named(rows: Rows, there: Sequence[str], ours: str, usual: Sequence[str], *, required: bool = True) -> str | None:
    """The column of the first usual name, or of the only one among the others."""
    if usual[0] in there:
        return usual[0]
    found = [name for name in usual[1:] if name in there]
    if len(found) == 1 or not (found or required):
        return found[0] if found else None
    if found:
        hint = f"say which in data.columns: {{{ours}: {found[0]}}}"
        raise UserError(f"several columns may be the {ours}: {listed(found)}", where=rows.name, hint=hint)
    raise _unknown(rows, ours, usual)


def _unknown(rows: Rows, ours: str, usual: Sequence[str]) -> UserError:
    what = f"no column for the {ours} was found"
    hint = f"name it in data.columns: {{{ours}: …}}; columns called {listed(usual)} are found without it"
    return UserError(what, where=f"{rows.name}, whose columns are {listed(rows.columns)}", hint=hint)
