"""Rows that reasoning-gym generates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import datasets

_PREFIX = "reasoning-gym:"
_SIZE = 1000
_SEED = 0
_MAX_SIZE = 1_000_000


def is_generated(reference: str) -> bool:
    """Return True if a reference names one of these data sets."""
    return reference.startswith(_PREFIX)


def load_generated(reference: str) -> datasets.Dataset:
    """Return the rows of a data set.

    Raises:
        UserError: if the package is missing, the data set does not exist, the configuration is invalid, or the scorer
            cannot read the metadata after conversion to JSON.
    """
    import datasets

    name, _, config = reference.removeprefix(_PREFIX).partition("?")
    values = {"size": _SIZE, "seed": _SEED, **_values(config, reference)}
    size = values["size"]
    if not isinstance(size, int) or not 0 < size <= _MAX_SIZE:
        raise UserError(f"size must be an integer from 1 to {_MAX_SIZE}", location=reference, hint="write ?size=500")
    if not isinstance(values["seed"], int) or values["seed"] < 0:
        raise UserError("seed must be a whole number from 0", location=reference, hint="write ?seed=1")
    dataset = _create(name, values | {"seed": values["seed"] * _MAX_SIZE}, reference)
    rows = [_row(dataset, index) for index in range(size)]
    first = dataset[0]
    if dataset.score_answer(first["answer"], first) != dataset.score_answer(first["answer"], _json_round_trip(first)):
        message = f"the scorer of '{name}' cannot read the metadata of a row"
        raise UserError(message, location=reference, hint="choose another data set")
    return datasets.Dataset.from_list(rows)


def _create(name: str, values: dict[str, Any], reference: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        message = f"the package 'reasoning-gym' cannot be imported: {error}"
        raise UserError(message, location=reference, hint="pip install 'deltaw[reward]'") from error
    if name not in DATASETS:
        raise UserError(f"no data set '{name}' exists", location=reference, hint=did_you_mean(name, sorted(DATASETS)))
    try:
        return reasoning_gym.create_dataset(name, **values)
    except (TypeError, ValueError, AssertionError) as error:
        message = f"the configuration does not fit: {error or 'a value is out of range'}"
        raise UserError(message, location=reference, hint=f"see reasoning-gym's configuration of {name}") from error


def _row(dataset: Any, index: int) -> dict[str, str | None]:
    entry = dataset[index]
    answer = entry["answer"]
    metadata = json.dumps(entry["metadata"], default=str)
    return {"prompt": entry["question"], "answer": None if answer is None else str(answer), "metadata": metadata}


def _json_round_trip(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a problem after conversion of its metadata to JSON and back."""
    return {**entry, "metadata": json.loads(json.dumps(entry["metadata"], default=str))}


def _values(text: str, reference: str) -> dict[str, Any]:
    """Parse ``key=value&key=value`` with values in JSON or plain text.

    Raises:
        UserError: if a part has another form.
    """
    values: dict[str, Any] = {}
    for part in filter(None, text.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UserError(f"'{part}' is no key=value", location=reference, hint="write ?size=500&seed=1")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values
