"""Interface of the inputs of rows besides tokens, for example images."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from deltaw.methods.base import Method


class TaskInputs(abc.ABC):
    """Inputs that the rows of a task refer to besides tokens.

    A run reads the rows, calls :meth:`prepare`, loads the model, and calls :meth:`attach`. A dry run only calls
    :meth:`attach`, with a model without weights.
    """

    @abc.abstractmethod
    def attach(self, model: PreTrainedModel, trained: Sequence[str] = (), *, is_new: bool = False) -> None:
        """Let a freshly loaded model read the inputs.

        Args:
            model: Model with or without weights.
            trained: Names of modules or parameters that are trained in full, or
                :data:`deltaw.methods.base.INPUT_LAYER`.
            is_new: True if modules that the model's files contain without training are trained.
        """

    def prepare(self, trained: Sequence[str], *, is_new: bool) -> None:  # noqa: B027
        """Compute inputs before the model is loaded. The arguments are those of :meth:`attach`."""

    def prepare_bytes(self) -> int:
        """Return the planned memory of :meth:`prepare`, or 0 if the inputs are stored."""
        return 0

    def resident_bytes(self) -> int:
        """Return the memory of inputs that are stored or remain mapped during training."""
        return 0

    def describe(self, rows: Sequence[Any]) -> list[str]:
        """Return messages about the inputs of these rows."""
        return []

    def groups(self, rows: Sequence[Any]) -> np.ndarray | None:
        """Return the group (n,) of each row, if rows of a group should be in the same step."""
        return None

    def extra_modules(self, model: PreTrainedModel) -> list[str]:
        """Return the names of attached modules that each method trains in addition to its own parameters."""
        return []

    def check_method(self, method: Method) -> None:  # noqa: B027
        """Reject a method that does not fit the inputs.

        Raises:
            UserError: if the method does not fit.
        """
