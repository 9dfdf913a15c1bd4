"""Replacement of modules and parameters of a model, and restoring of the originals.

Used for adapted layers, copies of extra trainable modules, untied parameters, and the embedding with a soft prompt.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from deltaw.kernels.torch_modules import direct_modules
from deltaw.lora.layers_parts import LoRAParameter

Original = TypeVar("Original", bound="nn.Module | nn.Parameter | None")
Current = TypeVar("Current", bound="nn.Module | nn.Parameter")
Spot = tuple[nn.Module, str]
"""A parent module and the attribute name of its child module or parameter."""


@dataclass
class ReplacedModule(Generic[Original, Current]):
    """A module or parameter that is replaced by another.

    Attributes:
        names: All full names. Files use the first.
        spots: (parent, attribute) for each name.
        original: The original, or None if it did not exist (an added bias).
        current: The replacement. It is ``original`` itself if that is trained in place.
    """

    names: tuple[str, ...]
    spots: list[Spot]
    original: Original
    current: Current

    @property
    def name(self) -> str:
        """Name used in files."""
        return self.names[0]

    def put(self, part: nn.Module | nn.Parameter | None) -> None:
        """Assign ``part`` at all spots."""
        for parent, attribute in self.spots:
            setattr(parent, attribute, part)

    def put_current(self) -> None:
        """Assign the replacement at all spots."""
        self.put(self.current)

    def put_original(self, model: nn.Module) -> None:
        """Restore the original with the replacement's device and dtype.

        ``model`` may have been moved or cast in the meantime, which does not affect parameters that only ``original``
        contains.
        """
        self._put_original({id(p) for p in model.parameters()})

    def _put_original(self, present: Container[int]) -> None:
        original = self.original
        current = self.current
        if isinstance(original, nn.Parameter) and isinstance(current, nn.Parameter):
            if original is not current and id(original) not in present:
                _match_device_and_dtype(original, current)
        elif isinstance(original, nn.Module) and isinstance(current, nn.Module):
            for name, parameter in original.named_parameters(remove_duplicate=False):
                if id(parameter) not in present:
                    _match_device_and_dtype(parameter, current.get_parameter(name))
            for name, buffer in original.named_buffers(remove_duplicate=False):
                _match_device_and_dtype(buffer, current.get_buffer(name))
            original.train(current.training)
        self.put(original)


Replacement = ReplacedModule[nn.Module, nn.Module]
"""A replaced module."""

ReplacedParameter = ReplacedModule["nn.Parameter | None", nn.Parameter]
"""A replaced parameter."""


@contextlib.contextmanager
def originals_restored(model: nn.Module, replacements: Iterable[ReplacedModule[Original, Current]]) -> Iterator[None]:
    """Context manager in which the model has its original modules and parameters."""
    replaced = list(replacements)
    present = {id(p) for p in model.parameters()}
    try:
        for replacement in replaced:
            replacement._put_original(present)
        yield
    finally:
        for replacement in replaced:
            replacement.put_current()


def find_spots(model: nn.Module, names: Sequence[str]) -> list[Spot]:
    """Return the spots with these full names of modules or parameters.

    Raises:
        AttributeError: if a parent is not a module of the model.
    """
    split = [name.rpartition(".") for name in names]
    return [(model.get_submodule(parent), attribute) for parent, _, attribute in split]


def find_module_spots(model: nn.Module, module: nn.Module) -> list[Spot]:
    """Return every spot of ``model`` that contains this ``module``."""
    return [(owner, key) for owner in model.modules() for key, part in direct_modules(owner).items() if part is module]


def _match_device_and_dtype(tensor: Tensor, reference: Tensor) -> None:
    """Move ``tensor`` to the device and dtype of ``reference``."""
    if tensor.device != reference.device or tensor.dtype != reference.dtype:
        tensor.data = tensor.data.to(device=reference.device, dtype=reference.dtype)


@dataclass
class TrainedBias:
    """A bias that is trained in place, with its original values."""

    name: str
    parameter: nn.Parameter
    original: Tensor


@dataclass
class ParameterUpdate:
    """An update of a parameter, with the module that computes with it.

    Attributes:
        names: Names of the module.
        runner: Module whose child ``key`` is the update.
        key: Attribute name of the update.
        layer: The update.
        is_attention: True if the module was selected as an attention, with both of its projections.
    """

    names: tuple[str, ...]
    runner: nn.Module
    key: str
    layer: LoRAParameter
    is_attention: bool = False

    @property
    def name(self) -> str:
        """Name of the update in the model."""
        return f"{self.names[0]}.{self.key}"

    def put(self) -> None:
        """Install the update in the module."""
        setattr(self.runner, self.key, self.layer)
        self.layer.register_hooks(self.runner)

    def remove(self) -> None:
        """Remove the update from the module."""
        self.layer.remove_hooks()
        if self.key in direct_modules(self.runner):
            delattr(self.runner, self.key)
