"""The trained parameters as they were at the best evaluation, on disk until the run ends.

Every method names its trained parameters, so they are kept as these, bit for bit, and the method writes its
adapter from them once they are back in the model. Knows no scores.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from deltaw.errors import UserError
from deltaw.tensor_files import TensorFile, save_tensors
from deltaw.training.session import Session

if TYPE_CHECKING:
    from torch import nn

FOLDER = "best"


class BestParameters:
    """Keeps the trained parameters of a session's best step in ``best/`` of the run's folder.

    A run that goes on from a checkpoint needs those that were the best then, so they stay until a later
    checkpoint is written.

    Args:
        session: whose parameters. folder: the run's.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._folder = folder / FOLDER
        self._needed: int | None = None  # by the last checkpoint
        self._newest: int | None = None

    def keep(self, step: int) -> None:
        """Write the parameters as they are now, whole or not at all."""
        save_tensors(self._file(step), self._parameters(), {"step": str(step)})
        self._newest = step
        self._remove_but({step, self._needed})

    def checkpointed(self, best_step: int | None) -> None:
        """A checkpoint is on the disk, written when ``best_step`` was the best: earlier ones may go."""
        self._needed = best_step
        self._remove_but({best_step, self._newest})

    def has(self, step: int) -> bool:
        """Whether the parameters of this step are there and whole."""
        try:
            with safe_open(self._file(step), framework="pt") as file:
                return set(file.keys()) == set(self._parameters())
        except (OSError, SafetensorError):
            return False

    @torch.no_grad()
    def put_back(self, step: int) -> None:
        """Give the model the parameters of this step again. Not while it trains.

        Raises:
            UserError: their file is not there, or damaged.
        """
        try:
            tensors = TensorFile(self._file(step))
            if missing := self._parameters().keys() - tensors.keys():
                raise ValueError(f"it lacks '{min(missing)}'")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the parameters of the best step, {step}, cannot be read: {error}",
                where=str(self._file(step)),
                hint="the adapter of the last step is in the run's folder",
            ) from error
        for name, parameter in self._parameters().items():
            parameter.copy_(tensors[name])
        self._session.method.after_step(self._session.model)

    def remove(self) -> None:
        """Remove all of them: the run is over."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._session.method.parameters(self._session.model))

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}.safetensors"

    def _remove_but(self, steps: set[int | None]) -> None:
        kept = {self._file(step) for step in steps if step is not None}
        for file in self._folder.glob("step-*.safetensors"):
            if file not in kept:
                file.unlink(missing_ok=True)
