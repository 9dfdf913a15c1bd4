"""What a method is: which parameters are trained, and what is kept of them on disk.

Training, planning and comparing know methods through this protocol alone.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn


class Method(Protocol):
    """One way to train few parameters of a model."""

    name: str

    def prepare(self, model: nn.Module, *, seed: int) -> str:
        """Freeze the model, make what is trained, ready to be trained, and answer with a few lines."""

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, nothing is drawn at random: what is trained answers as it will when it is done."""

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name."""

    def save(self, model: nn.Module, folder: str | os.PathLike[str], *, base_model: str) -> None:
        """Write what was trained; ``base_model`` is the reference that the model was loaded by."""

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        """Put what was saved onto a freshly loaded model, frozen, and answer with a few lines."""

    def can_share_prefixes(self) -> bool:
        """Whether tokens computed once for several rows train exactly as tokens computed for each."""
