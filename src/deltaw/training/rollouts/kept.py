"""Completions that several updates learn from, kept beside the run: one that is stopped between these updates cannot
write them again, since its weights have changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.durable import write_text
from deltaw.errors import UserError
from deltaw.training.rollouts.losses import Rollout

_ARRAYS = {
    "tokens": np.int32,
    "is_label": bool,
    "old_logprobs": np.float32,
    "base_logprobs": np.float32,
    "engine_logprobs": np.float32,
}
_NUMBERS = ("row", "prompt_length", "answer", "active_from", "advantage")


class KeptRollouts:
    """The rollouts of a run that may be asked for again.

    Args:
        folder: the run's. updates: optimizer steps of each rollout.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        self._run, self._folder, self._updates = folder, folder / "rollouts", updates

    def keep(self, number: int, rows: Sequence[Rollout]) -> None:
        """Write a rollout, and remove those that no checkpoint goes on within."""
        self._folder.mkdir(exist_ok=True)
        write_text(self._file(number), "[" + ",\n".join(json.dumps(_plain(row)) for row in rows) + "]\n")
        steps = (path.name.removeprefix("step-") for path in self._run.glob("checkpoints/step-*"))
        wanted = {number} | {int(step) // self._updates for step in steps if step.isdecimal()}
        for path in self._folder.glob("*.json"):
            if path.stem.isdecimal() and int(path.stem) not in wanted:
                path.unlink(missing_ok=True)

    def text(self, number: int) -> str:
        """A rollout as :func:`rollouts_in` reads it; empty where it is not kept."""
        try:
            return self._file(number).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.json"


def rollouts_in(text: str) -> list[Rollout]:
    """The completions of a rollout that was kept.

    Raises:
        UserError: this is none.
    """
    try:
        return [_rollout(one) for one in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "restore the folder from a copy, or begin anew with --fresh"
        raise UserError("the completions of the last step are damaged", where="rollouts", hint=hint) from error


def _plain(row: Rollout) -> dict[str, Any]:
    arrays = {name: getattr(row, name) for name in _ARRAYS}
    plain = {name: None if array is None else array.tolist() for name, array in arrays.items()}
    return plain | {name: getattr(row, name) for name in _NUMBERS}


def _rollout(values: dict[str, Any]) -> Rollout:
    arrays: dict[str, Any] = {
        n: None if values[n] is None else np.array(values[n], dtype) for n, dtype in _ARRAYS.items()
    }
    return Rollout(**arrays, **{name: values[name] for name in _NUMBERS})
