"""A module or parameter that another one replaces, and how to put the first one back.

Adapters replace layers, extra trainable modules are copies, a tied parameter is untied by a copy, and a soft
prompt replaces the input embedding. Each of them is a :class:`Place`. It knows torch modules only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor, nn

from deltaw.kernels.torch_private import own_modules

Original = TypeVar("Original", bound="nn.Module | nn.Parameter | None")
Current = TypeVar("Current", bound="nn.Module | nn.Parameter")
Spot = tuple[nn.Module, str]
"""A parent module and the attribute under which it holds a child module or a parameter."""


@dataclass
class Place(Generic[Original, Current]):
    """Where a module or parameter is, what was there before, and what is there now.

    Attributes:
        names: all full names of the place; files use the first.
        spots: (parent, attribute) for each name.
        original: what was there; None if there was no such parameter (a bias that was added).
        current: the replacement. It is ``original`` itself if that is trained in place.
    """

    names: tuple[str, ...]
    spots: list[Spot]
    original: Original
    current: Current

    @property
    def name(self) -> str:
        """The name that files use."""
        return self.names[0]

    def put(self, part: nn.Module | nn.Parameter | None) -> None:
        """Put ``part`` into all the spots."""
        for parent, attribute in self.spots:
            setattr(parent, attribute, part)

    def put_current(self) -> None:
        """Put the replacement into all the spots."""
        self.put(self.current)

    def put_original(self, model: nn.Module) -> None:
        """Put back what was there before, on the replacement's device and in its dtype.

        ``model`` may have been moved or cast since. Its own parameters went along; those that only
        ``original`` holds did not.
        """
        self._put_original({id(p) for p in model.parameters()})

    def _put_original(self, present: Container[int]) -> None:
        original, current = self.original, self.current
        if isinstance(original, nn.Parameter) and isinstance(current, nn.Parameter):
            if original is not current and id(original) not in present:
                _follow(original, current)
        elif isinstance(original, nn.Module) and isinstance(current, nn.Module):
            for name, parameter in original.named_parameters(remove_duplicate=False):
                if id(parameter) not in present:
                    _follow(parameter, current.get_parameter(name))
            for name, buffer in original.named_buffers(remove_duplicate=False):
                _follow(buffer, current.get_buffer(name))
            original.train(current.training)
        self.put(original)


Replacement = Place[nn.Module, nn.Module]
"""A module that another one replaces."""

ParameterPlace = Place["nn.Parameter | None", nn.Parameter]
"""A parameter of the model, and what is trained or loaded in its place."""


@contextlib.contextmanager
def as_before(model: nn.Module, places: Iterable[Place[Original, Current]]) -> Iterator[None]:
    """Within the block every place of ``model`` holds its original."""
    chosen = list(places)
    present = {id(p) for p in model.parameters()}
    try:
        for place in chosen:
            place._put_original(present)
        yield
    finally:
        for place in chosen:
            place.put_current()


def spots_of(model: nn.Module, names: Sequence[str]) -> list[Spot]:
    """The spots behind full names of modules or parameters.

    Raises:
        AttributeError: the parent of one is no module of the model.
    """
    split = [name.rpartition(".") for name in names]
    return [(model.get_submodule(parent), attribute) for parent, _, attribute in split]


def spots_holding(model: nn.Module, module: nn.Module) -> list[Spot]:
    """Every spot of ``model`` that holds this very ``module``."""
    return [
        (parent, attribute)
        for parent in model.modules()
        for attribute, child in own_modules(parent).items()
        if child is module
    ]


def _follow(tensor: Tensor, now: Tensor) -> None:
    """Bring ``tensor`` to the device and dtype of ``now``."""
    if tensor.device != now.device or tensor.dtype != now.dtype:
        tensor.data = tensor.data.to(device=now.device, dtype=now.dtype)
