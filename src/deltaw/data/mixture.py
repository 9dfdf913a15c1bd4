"""Several sources of rows, each with a weight: what ``data.train`` may be besides one reference.

It knows the setting's form and the arithmetic of weights; no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args

import numpy as np

from deltaw.data.formats import FormName, known_columns
from deltaw.errors import UserError, did_you_mean
from deltaw.local_names import Names

# ``data.train``: a reference, or a list of references and of sections
# {from: …, weight: …, columns: …, form: …}.
Train = Annotated[str | list[str | dict[str, Any]], Names("reference")]
_KEYS = ("from", "weight", "columns", "form")
_WEIGHING = 3  # selects a random stream of its own for the seed
_MOST = 1000.0
# A list of sources in the settings' JSON schema.
_TEXT, _NAMED = {"type": "string"}, {"propertyNames": {"enum": list(known_columns())}}
_SECTION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["from"],
    "properties": {
        "from": {**_TEXT, "description": "file, folder, hub id or package"},
        "weight": {"type": "number", "exclusiveMinimum": 0, "maximum": _MOST},
        "columns": {"type": "object", **_NAMED, "additionalProperties": _TEXT},
        "form": {"enum": list(get_args(FormName))},
    },
}
SOURCES_SCHEMA = {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT, _SECTION]}}


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        reference: file, folder, package or data set.
        weight: how many times its rows are seen, relative to once.
        columns, form: as ``data.columns`` and ``data.form``, for this source alone; None is those.
    """

    reference: str
    weight: float = 1.0
    columns: dict[str, str] | None = None
    form: str | None = None


def sources_of(train: Train) -> list[Source]:
    """The sources that ``data.train`` names.

    Raises:
        UserError: it names none, or one of them has a key or a value that cannot be.
    """
    if isinstance(train, str):
        return [Source(train)]
    if not train:
        raise UserError("data.train is an empty list", hint="name a file, or several")
    return [_source(entry, f"data.train, entry {number}") for number, entry in enumerate(train, start=1)]


def references(train: Train) -> list[str]:
    """The references alone."""
    return [source.reference for source in sources_of(train)]


def shown(train: Train) -> str:
    """The sources in one line, as ``a.jsonl + b.jsonl ×2``."""
    weights = [(s.reference, "" if s.weight == 1 else f" ×{s.weight:g}") for s in sources_of(train)]
    return " + ".join(reference + weight for reference, weight in weights)


def columns_are_known(columns: Mapping[str, str], where: str) -> None:
    """Raise a UserError if one of our names of columns is none."""
    known = known_columns()
    for name in columns:
        if name not in known:
            raise UserError(f"deltaw reads no column '{name}'", where=f"{where}.{name}", hint=did_you_mean(name, known))


def weighted(rows: np.ndarray, source_of: np.ndarray, weights: Sequence[float], seed: int) -> np.ndarray:
    """The rows of an epoch: those of a source with weight 2 twice, of one with weight 0.5 a half of them.

    Args:
        rows: (n,) places of the rows to train on, ascending. source_of: (n,) the source of each.
        weights: of each source. seed: draws the rows of a fraction, the same in all epochs.

    Returns:
        places, ascending, each as often as it comes in an epoch.
    """
    if all(weight == 1 for weight in weights):
        return rows
    random = np.random.default_rng([seed % 2**64, _WEIGHING])
    taken = []
    for number, weight in enumerate(weights):
        own = rows[source_of == number]
        whole = math.floor(weight)
        share = round((weight - whole) * len(own))
        taken += [np.repeat(own, whole), random.choice(own, size=share, replace=False)]
    return np.sort(np.concatenate(taken))


def _source(entry: object, where: str) -> Source:
    if isinstance(entry, str):
        return Source(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("from"), str):
        hint = "write data.train: [a.jsonl, {from: b.jsonl, weight: 2}]"
        raise UserError("a source is a reference, or a section with 'from'", where=where, hint=hint)
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"unknown key '{key}'", where=where, hint=did_you_mean(str(key), _KEYS))
    columns, form = entry.get("columns"), entry.get("form")
    if columns is not None:
        if not isinstance(columns, dict) or not all(isinstance(v, str) for v in columns.values()):
            hint = "write columns: {prompt: question, completion: answer}"
            raise UserError("'columns' must map our names to the file's", where=where, hint=hint)
        columns_are_known(columns, f"{where}, columns")
    if form is not None and form not in get_args(FormName):
        raise UserError(f"there is no format '{form}'", where=where, hint=did_you_mean(str(form), get_args(FormName)))
    return Source(entry["from"], _weight(entry.get("weight", 1.0), where), columns, form)


def _weight(value: object, where: str) -> float:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < number <= _MOST:
        hint = f"give a number above 0, to {_MOST:g}: 2 shows each row twice in an epoch, 0.5 half of them"
        raise UserError(f"the weight is {value!r}", where=where, hint=hint)
    return float(number)
