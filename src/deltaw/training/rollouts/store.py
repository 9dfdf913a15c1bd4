"""Storage of rollouts that several updates train on.

A run that is interrupted between these updates cannot generate the completions again, because its weights have changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaw.atomic_files import write_text
from deltaw.errors import UserError
from deltaw.training.rollouts.losses import Rollout

_ARRAYS: dict[str, Any] = {"tokens": np.int32, "is_label": bool}
_ARRAYS |= dict.fromkeys(("old_logprobs", "base_logprobs", "engine_logprobs"), np.float32)
_NUMBERS = ("row", "prompt_length", "answer", "active_from", "advantage")


class RolloutStore:
    """Rollouts of a run that may be needed after resuming.

    Args:
        folder: Folder of the run.
        updates: Optimizer steps per rollout.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        self._run, self._folder, self._updates = folder, folder / "rollouts", updates

    def save(self, index: int, rows: Sequence[Rollout]) -> None:
        """Store a rollout, and delete rollouts that no checkpoint needs."""
        self._folder.mkdir(exist_ok=True)
        write_text(self._file(index), "[" + ",\n".join(json.dumps(_plain(row)) for row in rows) + "]\n")
        steps = (path.name.removeprefix("step-") for path in self._run.glob("checkpoints/step-*"))
        needed = {index} | {int(step) // self._updates for step in steps if step.isdecimal()}
        for path in self._folder.glob("*.json"):
            if path.stem.isdecimal() and int(path.stem) not in needed:
                path.unlink(missing_ok=True)

    def text(self, index: int) -> str:
        """Return a stored rollout as input of :func:`parse_rollouts`, or an empty string."""
        try:
            return self._file(index).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def _file(self, index: int) -> Path:
        return self._folder / f"{index}.json"


def parse_rollouts(text: str) -> list[Rollout]:
    """Parse the completions of a stored rollout.

    Raises:
        UserError: if the text is invalid.
    """
    try:
        return [_rollout(values) for values in json.loads(text)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        hint = "restore the folder from a copy, or start over with --fresh"
        message = "the stored completions of the last step are corrupted"
        raise UserError(message, location="rollouts", hint=hint) from error


def _plain(row: Rollout) -> dict[str, Any]:
    arrays = {name: getattr(row, name) for name in _ARRAYS}
    plain = {name: None if array is None else array.tolist() for name, array in arrays.items()}
    return plain | {name: getattr(row, name) for name in _NUMBERS}


def _rollout(values: dict[str, Any]) -> Rollout:
    dtypes = _ARRAYS.items()
    arrays: dict[str, Any] = {n: None if values[n] is None else np.array(values[n], dtype) for n, dtype in dtypes}
    return Rollout(**arrays, **{name: values[name] for name in _NUMBERS})
