"""Weighted mixtures of several data sources."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from deltaw.errors import UserError, did_you_mean
from deltaw.settings.columns import all_columns
from deltaw.settings.local_names import LocalReference
from deltaw.settings.row_kinds import FormName

# Type of ``data.train``: a reference, or a list of references and sections {from: …, weight: …, columns: …, form: …}.
Train = Annotated[str | list[str | dict[str, Any]], LocalReference("reference")]
_KEYS = ("from", "weight", "columns", "form")
_MAX_WEIGHT = 1000.0
# A list of sources in the settings' JSON schema.
_TEXT = {"type": "string"}
_COLUMN_NAMES = {"propertyNames": {"enum": list(all_columns())}}
_SECTION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["from"],
    "properties": {
        "from": {**_TEXT, "description": "file, folder, hub id or package"},
        "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_WEIGHT},
        "columns": {"type": "object", **_COLUMN_NAMES, "additionalProperties": _TEXT},
        "form": {"enum": list(get_args(FormName))},
    },
}
SOURCES_SCHEMA = {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _SECTION]}}


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Attributes:
        reference: File, folder, package or data set.
        weight: Number of occurrences of each row per epoch, possibly fractional.
        columns: Replaces ``data.columns`` for this source, unless None.
        form: Replaces ``data.form`` for this source, unless None.
    """

    reference: str
    weight: float = 1.0
    columns: dict[str, str] | None = None
    form: str | None = None


def sources_of(train: Train) -> list[MixtureSource]:
    """Return the sources in ``data.train``.

    Raises:
        UserError: if it is empty, or an entry has an unknown key or an invalid value.
    """
    if isinstance(train, str):
        return [MixtureSource(train)]
    if not train:
        raise UserError("data.train is an empty list", hint="name a file, or several")
    return [_source(entry, f"data.train, entry {number}") for number, entry in enumerate(train, start=1)]


def references(train: Train) -> list[str]:
    """Return the references of the sources."""
    return [source.reference for source in sources_of(train)]


def format_sources(train: Train) -> str:
    """Return the sources in one line, for example ``a.jsonl + b.jsonl ×2``."""
    weights = [(s.reference, "" if s.weight == 1 else f" ×{s.weight:g}") for s in sources_of(train)]
    return " + ".join(reference + weight for reference, weight in weights)


def check_column_names(columns: Mapping[str, str], location: str) -> None:
    """Raise a UserError if a key of ``data.columns`` is not a column name that deltaw uses."""
    names = all_columns()
    for name in columns:
        if name not in names:
            raise UserError(f"unknown column '{name}'", location=f"{location}.{name}", hint=did_you_mean(name, names))


def _source(entry: object, location: str) -> MixtureSource:
    if isinstance(entry, str):
        return MixtureSource(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("from"), str):
        hint = "write data.train: [a.jsonl, {from: b.jsonl, weight: 2}]"
        raise UserError("a source must be a reference, or a section with 'from'", location=location, hint=hint)
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"unknown key '{key}'", location=location, hint=did_you_mean(str(key), _KEYS))
    columns = entry.get("columns")
    form = entry.get("form")
    if columns is not None:
        if not isinstance(columns, dict) or not all(isinstance(v, str) for v in columns.values()):
            hint = "write columns: {prompt: question, completion: answer}"
            raise UserError("'columns' must map deltaw's column names to the file's", location=location, hint=hint)
        check_column_names(columns, f"{location}, columns")
    if form is not None and form not in get_args(FormName):
        raise UserError(f"no format '{form}'", location=location, hint=did_you_mean(str(form), get_args(FormName)))
    return MixtureSource(entry["from"], _weight(entry.get("weight", 1.0), location), columns, form)


def _weight(value: object, location: str) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < number <= _MAX_WEIGHT:
        hint = f"give a number above 0, to {_MAX_WEIGHT:g}: 2 shows each row twice in an epoch, 0.5 half of them"
        raise UserError(f"the weight is {value!r}", location=location, hint=hint)
    return float(number)
