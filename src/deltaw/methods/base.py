"""The interface of a training method, which selects the trainable parameters of a run and defines their file format.

Training, planning and comparing use methods only through :class:`Method`.
"""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.lora.starting import require_finite
from deltaw.tensor_files import has_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

    from deltaw.lora.config import LoRAConfig
    from deltaw.lora.files import AdapterFile


class MethodOptions(Protocol):
    """The options of the ``train:`` section that methods read."""

    @property
    def loraplus_lr_ratio(self) -> float: ...


class Start(Protocol):
    """Adapters that a run starts from, see :class:`deltaw.methods.start.StartAdapter`."""

    @property
    def folder(self) -> Path: ...
    @property
    def location(self) -> str: ...
    @property
    def is_stacked(self) -> bool: ...
    @property
    def keeps_new(self) -> bool: ...
    def lora(self, config: LoRAConfig, *, dry_run: bool = False) -> tuple[AdapterFile, LoRAConfig]: ...
    def require_base(self, fingerprint: str | None) -> None: ...


Folder: TypeAlias = str | os.PathLike[str]
Metadata: TypeAlias = Mapping[str, str]
Tensors: TypeAlias = Mapping[str, torch.Tensor]
Names: TypeAlias = Sequence[str]
Calibration: TypeAlias = Callable[[], None] | None
"""Runs the model on a sample of the user's rows."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Metadata key of the weights file: names of a classifier's classes, as JSON.
CLASSES_KEY = "deltaw.classes"
# Metadata key of the weights file: parameters excluded from the base model's fingerprint, as JSON.
REPLACED_KEY = "deltaw.replaced"

# Refers to the input layer of the model, which is the connector of a vision-language model.
INPUT_LAYER = "input layer"
# Refers to the vision tower of a vision-language model.
VISION_TOWER = "vision tower"


class Method(abc.ABC):
    """A parameter-efficient training method.

    By default, a method has no randomness in its forward pass, one learning rate, and no virtual tokens.

    Attributes:
        name: Value of the setting ``method``.
        default_learning_rate: Usual learning rate for AdamW. If ``rate_scales_with_width`` is True, it is the rate for
            a model with hidden size 4,096.
        rate_scales_with_width: True if narrower models need a higher rate.
        virtual_tokens: Number of positions prepended to each row.
        is_activated: True if the adapter acts only after an invocation sequence.
        requested_invocation: Invocation sequence from the settings, token ids or text. None if it must be derived.
        invocation: Token ids of the invocation sequence, or None until they are known.
        section: Class of the method's settings.
        tokenizer: Tokenizer of the model. None if the rows are images.
        start_values: Initial values of the trainable parameters of a run that starts from an adapter, or None.
    """

    name: str
    default_learning_rate: float
    rate_scales_with_width: bool = True
    virtual_tokens: int = 0
    is_activated: bool = False
    requested_invocation: Sequence[int] | str | None = None
    invocation: Sequence[int] | None = None
    section: type | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = self.section() if settings is None and self.section is not None else settings
        self.start_values: list[torch.Tensor] | None = None

    @classmethod
    def from_run(cls, section: object, train: MethodOptions | None, tokenizer: PreTrainedTokenizerBase | None) -> Self:
        """Create the method from its section of a run's settings.

        Args:
            section: Settings section of the method. None if the method has no settings or an adapter is loaded.
            train: The run's ``train:`` section, or None if an adapter is loaded.
            tokenizer: Tokenizer of the model. None if the rows are images.
        """
        method = cls() if section is None else cls(section)
        method.tokenizer = tokenizer
        return method

    @property
    def trained_modules(self) -> Sequence[str]:
        """Names of the modules that the settings train in full, or :data:`INPUT_LAYER`."""
        return ()

    def set_invocation(self, tokens: Sequence[int]) -> None:  # noqa: B027 - optional hook
        """Set the invocation sequence. Called before :meth:`prepare`."""

    @abc.abstractmethod
    def prepare(self, model: nn.Module, *, seed: int, extra_modules: Names = (), calibrate: Calibration = None) -> str:
        """Freeze the model, create the trainable parameters, and return a short summary.

        Args:
            model: Model to train.
            seed: Seed of the random initialization.
            extra_modules: Names of modules to train in full, such as a new classifier.
            calibrate: Runs the model on a sample of the user's rows, for data-dependent initializations.

        Raises:
            UserError: if the method does not support the model.
        """

    def prepare_from(self, model: nn.Module, start: Start, *, seed: int, extra_modules: Names = ()) -> str:
        """Call :meth:`prepare`, and set the trainable parameters to those of a saved adapter.

        Args:
            model: Model to train.
            start: Adapters to start from.
            seed: Seed of parameters that the adapters do not contain.
            extra_modules: See :meth:`prepare`.

        Returns:
            Short summary.

        Raises:
            UserError: if the adapters do not fit the model or the settings.
        """
        message = f"method '{self.name}' cannot start from an adapter"
        raise UserError(message, location="start_from", hint="remove it, or use another method")

    def _copy_start(self, named: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor], start: Start) -> None:
        """Copy the tensors of an adapter to the trainable tensors with the same names. A dry run only compares them."""
        for name in sorted({*named, *stored}):
            ours, theirs = (tuple(group[name].shape) if name in group else None for group in (named, stored))
            if ours != theirs:
                message = f"'{name}' is {ours} in this run and {theirs} in the adapter"
                hint = f"use the settings of method {self.name} that the adapter was trained with"
                raise UserError(message, location=start.location, hint=hint)
        if not all(map(has_values, named.values())):
            return
        require_finite(stored, start.location)
        with torch.no_grad():
            for name, tensor in named.items():
                tensor.copy_(stored[name])

    def record_start(self, model: nn.Module) -> None:
        """Record the current parameters as the start, if the method also stores the base model."""
        if self.can_restore_base(model):
            self.start_values = [parameter.detach().clone() for _, parameter in self.parameters(model)]

    @contextlib.contextmanager
    def start_active(self, model: nn.Module) -> Iterator[None]:
        """Context manager in which the trained parameters have their values at the start of the run.

        Raises:
            UserError: if these values were not stored.
        """
        if self.start_values is None:
            message = f"method '{self.name}' keeps no copy of the adapter of start_from, which is the reference model"
            raise UserError(message, location="method", hint="use method: lora")
        parameters = [parameter for _, parameter in self.parameters(model)]
        current = [parameter.detach().clone() for parameter in parameters]

        def assign(values: Sequence[torch.Tensor]) -> None:
            with torch.no_grad():  # in place, so that values cached by the parameters' versions are updated
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.copy_(value)
            self.after_step(model)

        assign(self.start_values)
        try:
            yield
        finally:
            assign(current)

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager that disables randomness such as dropout, so that the model answers as after training."""
        return contextlib.nullcontext()

    def can_restore_base(self, model: nn.Module) -> bool:
        """True if :meth:`base_model_active` is supported.

        False if parameters were trained in place, since no copy of the base model's values exists. Always True after
        :meth:`load`.
        """
        return True

    @abc.abstractmethod
    def base_model_active(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context manager in which the model behaves as the base model.

        Raises:
            UserError: if the base model's values were not stored.
        """

    @abc.abstractmethod
    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Return the trainable parameters with their names. No other parameter has gradients or optimizer state."""

    def rate_factor(self, name: str) -> float:
        """Return the learning rate multiplier of a parameter."""
        return 1.0

    def after_step(self, model: nn.Module) -> None:  # noqa: B027 - optional hook
        """Copy the optimizer's result into the model, if the optimizer updates different tensors."""

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Return the row with virtual tokens prepended: (length,) to (virtual tokens + length,)."""
        return tokens

    @abc.abstractmethod
    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        """Save the trained parameters.

        Args:
            model: Trained model.
            folder: Folder of the adapter.
            base_model: Reference that the base model was loaded from.
            metadata: Entries to add to the metadata of the weights file.
        """

    @abc.abstractmethod
    def load(self, model: nn.Module, folder: Folder) -> str:
        """Apply a saved adapter, frozen, to a newly loaded model and return a short summary."""

    def can_share_prefixes(self) -> bool:
        """True if training is unaffected by computing a prefix shared by several rows once."""
        return True
