"""What a reward function gets and gives, and how one of a user's own file is found.

Knows texts and rows; no model, no tokens, no torch.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, did_you_mean
from deltaw.task_settings import RewardFunction


@dataclass(frozen=True)
class Scored:
    """A completion to be rewarded.

    Attributes:
        prompt: the last turn of what was asked, as text. text: the completion, without its end mark.
        answer: the row's own answer; None if it has none.
        row: number of the row in its file. columns: of the row.
        ended: whether the model ended it, rather than the limit of its tokens.
    """

    prompt: str
    text: str
    answer: str | None
    row: int
    columns: Mapping[str, Any]
    ended: bool = True


Reward = Callable[[Sequence[Scored]], Sequence["float | None"]]


def right_answer(settings: RewardFunction, one: Scored) -> str | None:
    """Of the named column, or the row's own."""
    if settings.column is None:
        return one.answer
    value = one.columns.get(settings.column)
    return None if value is None else str(value)


def place_of(settings: RewardFunction) -> str:
    """Where a reward stands in the settings, for messages."""
    return f"reward.functions, {settings.name}"


def needs_extra(package: str, error: ImportError, where: str) -> UserError:
    """The refusal of what an optional package computes."""
    what = f"the package '{package}' cannot be imported: {error}"
    return UserError(what, where=where, hint="pip install 'deltaw[reward]'")


def require_file(reference: str, where: str) -> Path:
    """Return the file of ``FILE.py:NAME``.

    Raises:
        UserError: there is no such file.
    """
    file = reference.rpartition(":")[0]
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no file {file or reference}", where=where, hint="write FILE.py:NAME")
    return path


def from_file(reference: str, where: str) -> Callable[..., Any]:
    """What ``FILE.py:NAME`` names.

    Raises:
        UserError: there is no such file or name, or the file cannot be run.
    """
    file, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("rewards_of_the_run", require_file(reference, where))
    assert spec is not None and spec.loader is not None, "the file's name ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a foreign file raises
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {error}", where=where) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise UserError(f"{file} has no function '{name}'", where=where, hint=did_you_mean(name, own))
    return found
