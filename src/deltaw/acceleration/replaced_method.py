"""Replacement of a model's method that can be undone exactly."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def original_method(module: nn.Module, name: str, previous: Callable[..., Any] | None) -> Callable[..., Any]:
    """Return a method of a module before it was replaced: ``previous``, or that of its class."""
    return types.MethodType(getattr(type(module), name), module) if previous is None else previous


class ReplacedMethod:
    """A method of one model. Subclasses implement ``__call__``.

    Args:
        module: The model.
        name: Name of the method.

    Attributes:
        original: The method before, bound.
        owner: Object that installed the method. It lives as long as the model.
    """

    def __init__(self, module: PreTrainedModel, name: str = "forward") -> None:
        self.module = module
        self.owner: object = None
        self.original: Callable[..., Any] = getattr(module, name)
        self._previous = vars(module).get(name)
        self.__name__ = name
        # Trainers and generate() read the names of the arguments.
        self.__signature__ = inspect.signature(self.original)

    def install(self) -> None:
        """Use this method."""
        vars(self.module)[self.__name__] = self

    def remove(self) -> None:
        """Use the method from before. Does nothing if other code has replaced this one."""
        methods = vars(self.module)
        if methods.get(self.__name__) is not self:
            return
        if self._previous is None:
            del methods[self.__name__]
        else:
            methods[self.__name__] = self._previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Copies of the model are not accelerated."""
        return original_method(copy.deepcopy(self.module, memo), self.__name__, copy.deepcopy(self._previous, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return original_method, (self.module, self.__name__, self._previous)

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
