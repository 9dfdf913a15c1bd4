"""What a method is: which parameters are trained, and what is kept of them on disk.

Training, planning and comparing know methods through this protocol alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
from torch import nn

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Key of the weights file's metadata for the names of the classes that a classifier tells apart, as JSON.
CLASSES_KEY = "deltaw.classes"


class Method(Protocol):
    """One way to train few parameters of a model.

    Attributes:
        name: as in the setting ``method``.
        usual_rate: a learning rate of AdamW that works in most cases, for a model 4,096 wide where it
            ``falls_with_width``.
        falls_with_width: whether narrower models want a higher rate.
        virtual_tokens: how many positions it puts before each row.
    """

    name: str
    usual_rate: float
    falls_with_width: bool
    virtual_tokens: int

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        """Freeze the model, make what is trained, ready to be trained, and answer with a few lines.

        Args:
            seed: of what is drawn at random.
            beside: names of modules that are trained whole beside it, such as a new classifier.
            look: runs the model over some of the user's own rows, for starts that depend on them.
        """

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, nothing is drawn at random: what is trained answers as it will when it is done."""

    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        """While open, the model answers as it did before it was trained."""

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name: gradients and optimizer state exist for these alone."""

    def rate_factor(self, name: str) -> float:
        """What the learning rate of this parameter is multiplied with."""

    def after_step(self, model: nn.Module) -> None:
        """Bring what the optimizer has changed into the model, where that is not the same tensor."""

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """A row as the model is to see it: (length,) to (length + virtual tokens,)."""

    def save(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        base_model: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write what was trained.

        Args:
            base_model: the reference that the model was loaded by.
            metadata: goes into the weights file's own.
        """

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        """Put what was saved onto a freshly loaded model, frozen, and answer with a few lines."""

    def can_share_prefixes(self) -> bool:
        """Whether tokens computed once for several rows train exactly as tokens computed for each."""
