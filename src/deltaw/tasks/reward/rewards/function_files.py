"""Functions of the user, named as ``FILE.py:NAME``."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaw.errors import UserError, did_you_mean


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
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        candidates = [key for key, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise UserError(f"{file} has no function '{name}'", location=location, hint=did_you_mean(name, candidates))
    return function
