"""Types of reward functions, and loading of functions from files."""

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
class Completion:
    """A completion to score.

    Attributes:
        prompt: Text of the last turn of the prompt.
        text: Text of the completion, without the end token.
        answer: Answer of the row, or None.
        row: Number of the row in its file.
        columns: Columns of the row.
        ended: True if the model ended the completion, False if it reached the token limit.
    """

    prompt: str
    text: str
    answer: str | None
    row: int
    columns: Mapping[str, Any]
    ended: bool = True


Reward = Callable[[Sequence[Completion]], Sequence["float | None"]]


def expected_answer(settings: RewardFunction, completion: Completion) -> str | None:
    """Return the value of the configured column, or the answer of the row."""
    if settings.column is None:
        return completion.answer
    value = completion.columns.get(settings.column)
    return None if value is None else str(value)


def settings_location(settings: RewardFunction) -> str:
    """Return the location of a reward in the settings, for messages."""
    return f"reward.functions, {settings.name}"


def missing_package_error(package: str, error: ImportError, location: str) -> UserError:
    """Return the error for a missing optional package."""
    message = f"the package '{package}' cannot be imported: {error}"
    return UserError(message, location=location, hint="pip install 'deltaw[reward]'")


def require_file(reference: str, location: str) -> Path:
    """Return the file of ``FILE.py:NAME``.

    Raises:
        UserError: if the file does not exist.
    """
    file = reference.rpartition(":")[0]
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"there is no file {file or reference}", location=location, hint="use FILE.py:NAME")
    return path


def load_function(reference: str, location: str) -> Callable[..., Any]:
    """Load the object ``FILE.py:NAME``.

    Raises:
        UserError: if the file or the name does not exist, or the file cannot be executed.
    """
    file, _, name = reference.rpartition(":")
    spec = importlib.util.spec_from_file_location("rewards_of_the_run", require_file(reference, location))
    assert spec is not None and spec.loader is not None, "the file's name ends in .py"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # user code can raise any exception
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {error}", location=location) from error
    function = getattr(module, name, None)
    if not callable(function):
        candidates = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise UserError(f"{file} has no function '{name}'", location=location, hint=did_you_mean(name, candidates))
    return function
