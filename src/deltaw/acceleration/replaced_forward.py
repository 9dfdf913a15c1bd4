"""Replacement of a module's forward method that can be undone exactly."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def own_forward(module: nn.Module, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return the forward method of a module before it was replaced: ``previous``, or that of its class."""
    return types.MethodType(type(module).forward, module) if previous is None else previous


class ReplacedForward:
    """Forward method of one module. Subclasses implement ``__call__``.

    Attributes:
        module: The module.
        original: Its forward method before, bound.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self.module = module
        self.original: Callable[..., Any] = module.forward
        self._previous = vars(module).get("forward")
        self.__name__ = "forward"
        # Trainers and generate() read the names of the arguments.
        self.__signature__ = inspect.signature(self.original)

    def install(self) -> None:
        """Use this forward method."""
        vars(self.module)["forward"] = self

    def remove(self) -> None:
        """Use the method from before. Does nothing if other code has replaced this one."""
        if vars(self.module).get("forward") is not self:
            return
        if self._previous is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Copies of the module are not accelerated."""
        return own_forward(copy.deepcopy(self.module, memo), copy.deepcopy(self._previous, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return own_forward, (self.module, self._previous)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name.

        Raises:
            TypeError: if they do not match the signature.
        """
        values = self.__signature__.bind(*args, **kwargs).arguments
        for parameter in self.__signature__.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                values.update(values.pop(parameter.name, {}))
        return values
