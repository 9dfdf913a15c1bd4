"""Data sets of the package reasoning-gym as rows: ``reasoning-gym:NAME?size=500&seed=1&KEY=VALUE``.

The package makes problems by name, seed and configuration, the same ones each time. Its problem i of seed s is problem
i - 1 of seed s + 1, so seeds are spread before it gets them: two sets of different seeds have no problem in common by
construction. A row has ``prompt``, ``answer``
and ``metadata``, the JSON text that the package's scorers read. Knows no scores.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deltaw.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import datasets

_PREFIX = "reasoning-gym:"
_SIZE, _SEED, _MOST = 1000, 0, 1_000_000


def is_reference(reference: str) -> bool:
    """Whether it names one of these data sets."""
    return reference.startswith(_PREFIX)


def load(reference: str) -> datasets.Dataset:
    """The rows of a data set, in memory.

    Raises:
        UserError: the package is missing, there is no such data set, its configuration does not fit, or its scorer
            cannot read what JSON keeps of a problem.
    """
    import datasets

    name, _, config = reference.removeprefix(_PREFIX).partition("?")
    values = {"size": _SIZE, "seed": _SEED, **_values(config, reference)}
    size = values["size"]
    if not isinstance(size, int) or not 0 < size <= _MOST:
        raise UserError(f"size must be a whole number from 1 to {_MOST}", where=reference, hint="write ?size=500")
    if not isinstance(values["seed"], int) or values["seed"] < 0:
        raise UserError("seed must be a whole number from 0", where=reference, hint="write ?seed=1")
    made = _made(name, values | {"seed": values["seed"] * _MOST}, reference)
    rows = [_row(made, place) for place in range(size)]
    first = made[0]
    if made.score_answer(first["answer"], first) != made.score_answer(first["answer"], _again(first)):
        what = f"the scorer of '{name}' cannot read the metadata of a row"
        raise UserError(what, where=reference, hint="choose another data set")
    return datasets.Dataset.from_list(rows)


def _made(name: str, values: dict[str, Any], reference: str) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        what = f"the package 'reasoning-gym' cannot be imported: {error}"
        raise UserError(what, where=reference, hint="pip install 'deltaw[reward]'") from error
    if name not in DATASETS:
        raise UserError(f"there is no data set '{name}'", where=reference, hint=did_you_mean(name, sorted(DATASETS)))
    try:
        return reasoning_gym.create_dataset(name, **values)
    except (TypeError, ValueError, AssertionError) as error:
        what = f"the configuration does not fit: {error or 'a value is out of range'}"
        raise UserError(what, where=reference, hint=f"see reasoning-gym's configuration of {name}") from error


def _row(made: Any, place: int) -> dict[str, str | None]:
    entry = made[place]
    answer = entry["answer"]
    metadata = json.dumps(entry["metadata"], default=str)
    return {"prompt": entry["question"], "answer": None if answer is None else str(answer), "metadata": metadata}


def _again(entry: dict[str, Any]) -> dict[str, Any]:
    """A problem as a row keeps it."""
    return {**entry, "metadata": json.loads(json.dumps(entry["metadata"], default=str))}


def _values(text: str, reference: str) -> dict[str, Any]:
    """``key=value&key=value``, values as in JSON or plain text.

    Raises:
        UserError: a part is not of that form.
    """
    found: dict[str, Any] = {}
    for part in filter(None, text.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise UserError(f"'{part}' is no key=value", where=reference, hint="write ?size=500&seed=1")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
