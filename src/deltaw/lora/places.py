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

Part = TypeVar("Part", nn.Module, nn.Parameter)
Spot = tuple[nn.Module, str]
"""A parent module and the attribute under which it holds a child module or a parameter."""


@dataclass
class Place(Generic[Part]):
    """Where a module or parameter is, what was there before, and what is there now.

    Attributes:
        names: all full names of the place; files use the first.
        spots: (parent, attribute) for each name.
        before: what was there; None if there was no such parameter (a bias that was added).
        now: the replacement. It is ``before`` itself if that is trained in place.
    """

    names: tuple[str, ...]
    spots: list[Spot]
    before: Part | None
    now: Part

    @property
    def name(self) -> str:
        """The name that files use."""
        return self.names[0]

    def put(self, part: Part | None) -> None:
        """Put ``part`` into all the spots."""
        for parent, attribute in self.spots:
            table = parent._parameters if isinstance(self.now, nn.Parameter) else parent._modules
            table[attribute] = part  # type: ignore[assignment]

    def put_now(self) -> None:
        """Put the replacement into all the spots."""
        self.put(self.now)

    def put_before(self, model: nn.Module) -> None:
        """Put back what was there before, on the replacement's device and in its dtype.

        ``model`` may have been moved or cast since. Its own parameters went along; those that only
        ``before`` holds did not.
        """
        self._put_before({id(p) for p in model.parameters()})

    def _put_before(self, present: Container[int]) -> None:
        before, now = self.before, self.now
        if isinstance(before, nn.Parameter) and before is not now and id(before) not in present:
            _follow(before, now)
        elif isinstance(before, nn.Module):
            for name, parameter in before.named_parameters(remove_duplicate=False):
                if id(parameter) not in present:
                    _follow(parameter, now.get_parameter(name))  # type: ignore[union-attr]
            for name, buffer in before.named_buffers(remove_duplicate=False):
                _follow(buffer, now.get_buffer(name))  # type: ignore[union-attr]
            before.train(now.training)  # type: ignore[union-attr]
        self.put(before)


@contextlib.contextmanager
def as_before(model: nn.Module, places: Iterable[Place[Part]]) -> Iterator[None]:
    """Within the block every place of ``model`` holds what it held before."""
    chosen = list(places)
    present = {id(p) for p in model.parameters()}
    try:
        for place in chosen:
            place._put_before(present)
        yield
    finally:
        for place in chosen:
            place.put_now()


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
        for attribute, child in parent._modules.items()
        if child is module
    ]


def _follow(tensor: Tensor, now: Tensor) -> None:
    """Bring ``tensor`` to the device and dtype of ``now``."""
    if tensor.device != now.device or tensor.dtype != now.dtype:
        tensor.data = tensor.data.to(device=now.device, dtype=now.dtype)
