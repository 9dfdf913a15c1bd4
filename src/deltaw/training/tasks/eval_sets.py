"""The rows of a run with all sets that it is evaluated on (``data.eval``), whichever task reads them.

A task reads the training rows and one set: that which is drawn from them, or a file. The other files are read
here, each by the same task. Knows no format of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from deltaw.data.settings import DataSettings, drawn_set, eval_sets
from deltaw.errors import UserError
from deltaw.training.callbacks import Say, silent
from deltaw.training.tasks.base import RunData, Task


def read_run_data(task: Task, settings: DataSettings, *, seed: int, say: Say = silent) -> RunData:
    """The rows of a run, with all its sets of held-out rows.

    Args:
        say: told of sets that have rows of the training data.

    Raises:
        UserError: the data cannot be used.
    """
    if not isinstance(settings.eval, dict):
        return task.read(settings, seed=seed)
    sets = eval_sets(settings.eval)
    first = drawn_set(settings.eval) or next(iter(sets))
    data = task.read(replace(settings, eval=sets[first]), seed=seed)
    found: dict[str, Sequence[Any]] = {}
    for name, reference in sets.items():
        if name == first:
            found[name] = data.held_out
            continue
        try:
            rows, report = task.read_file(str(reference), settings, data.classes)
        except UserError as error:
            where = f"data.eval.{name}" + (f": {error.where}" if error.where else "")
            raise UserError(error.what, where=where, hint=error.hint) from error
        found[name] = rows
        say(f"evaluation set '{name}': {report.rows_kept:,} rows of {reference}{_overlap(data.train, rows)}")
    return replace(data, held_out=next(iter(found.values())), eval_sets=found)


def _overlap(train: Sequence[Any], rows: Sequence[Any]) -> str:
    """What to say of rows that are trained on too; rows without tokens are not compared."""
    if not all(hasattr(row, "tokens") for row in rows):
        return ""
    asked = {row.tokens.tobytes() for row in rows}
    seen = asked.intersection(row.tokens.tobytes() for row in train if hasattr(row, "tokens"))
    count = sum(row.tokens.tobytes() in seen for row in rows)
    return f"; {count:,} of them are also training rows, which inflates its scores" if count else ""
