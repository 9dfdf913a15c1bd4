"""What a method is: which parameters a run trains, and what it saves of them.

Training, planning and comparing know methods through this class alone.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TrainOptions(Protocol):
    """The part of the ``train:`` section that methods read."""

    @property
    def b_rate(self) -> float: ...


Made = TypeVar("Made", bound="Method")
Folder: TypeAlias = str | os.PathLike[str]
Metadata: TypeAlias = Mapping[str, str]
Calibration: TypeAlias = Callable[[], None]
"""Runs the model on some of the user's rows."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Key in the metadata of the weights file: the names of a classifier's classes, as JSON.
CLASSES_KEY = "deltaw.classes"
# The same: the parameters whose values the base model's fingerprint leaves out, as JSON.
REPLACED_KEY = "deltaw.replaced"


class Method(abc.ABC):
    """One way to train few parameters of a model. By default nothing is random, all parameters have one learning
    rate, and there are no virtual tokens.

    Attributes:
        name: the value of the setting ``method``.
        usual_rate: a learning rate for AdamW that works in most cases. Where it ``falls_with_width``, it is
            the rate for a model with hidden size 4,096.
        falls_with_width: whether narrower models want a higher rate.
        virtual_tokens: the number of positions that it prepends to each row.
        activates: whether what it trains acts only from an invocation sequence on.
        invocation_given: that sequence as the user gave it, ids or text; None where it is to be derived.
        invocation: its token ids, once they are known; else None.
        section: the class of its settings.
    """

    name: str
    usual_rate: float
    falls_with_width: bool = True
    virtual_tokens: int = 0
    activates: bool = False
    invocation_given: Sequence[int] | str | None = None
    invocation: Sequence[int] | None = None
    section: type | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = self.section() if settings is None and self.section is not None else settings

    @classmethod
    def from_run(
        cls: type[Made], section: object, *, train: TrainOptions | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> Made:
        """Make the method from its section of a run's settings; None stands for the defaults.

        Args:
            section: the section; None where the method has none, or where an adapter is loaded.
            train: the run's ``train:`` section; None where an adapter is loaded.
            tokenizer: of the model; None for images.
        """
        made = cls() if section is None else cls(section)
        made.tokenizer = tokenizer
        return made

    def invoke_by(self, tokens: Sequence[int]) -> None:  # noqa: B027 - most act on all tokens
        """Be told the invocation sequence, before :meth:`prepare`."""

    @abc.abstractmethod
    def prepare(
        self, model: nn.Module, *, seed: int, extra_modules: Sequence[str] = (), calibrate: Calibration | None = None
    ) -> str:
        """Freeze the model, create the trained parameters, and return a few lines about them.

        Args:
            seed: for random initialization.
            extra_modules: names of modules that are trained whole as well, such as a new classifier.
            calibrate: runs the model on some of the user's rows, for initializations that depend on data.

        Raises:
            UserError: the method does not fit the model.
        """

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the block nothing is random: the model answers as it will after training."""
        return contextlib.nullcontext()

    def keeps_base(self, model: nn.Module) -> bool:
        """Whether :meth:`without` is possible. Not where parameters were trained in place: nobody paid for a
        copy of them. After :meth:`load` it always is."""
        return True

    @abc.abstractmethod
    def without(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within the block the model is the base model.

        Raises:
            UserError: the base model was not kept.
        """

    @abc.abstractmethod
    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters, by name. Only these have gradients and optimizer state."""

    def rate_factor(self, name: str) -> float:
        """The factor on the learning rate of this parameter."""
        return 1.0

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - most change the very tensors
        """Write what the optimizer changed into the model, where the tensors are different ones."""

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """The row that the model sees: (length,) to (virtual tokens + length,)."""
        return tokens

    @abc.abstractmethod
    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        """Write the trained parameters.

        Args:
            base_model: the reference that the model was loaded by.
            metadata: added to the metadata of the weights file.
        """

    @abc.abstractmethod
    def load(self, model: nn.Module, folder: Folder) -> str:
        """Apply a saved adapter to a freshly loaded model, frozen, and return a few lines about it."""

    def can_share_prefixes(self) -> bool:
        """Whether training is the same when a prefix that rows share is computed once."""
        return True
