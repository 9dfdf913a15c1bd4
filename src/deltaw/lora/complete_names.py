"""Names of the modules of a text view in the complete model that the view was taken from.

A text view is the causal language model of a vision-language model. Adapter files contain the names of the complete
model, so that other programs load them on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

_ATTRIBUTE = "_deltaw_complete_names"


@dataclass(frozen=True)
class NameMap:
    """Maps names of modules and parameters between a text view and its complete model.

    Attributes:
        prefix: Name of the language model in the complete model, for example ``model.language_model``.
        modules: Name in the view and name in the complete model of the language model and of each other module of the
            view. The first entry whose name is a prefix applies.
        config: Configuration of the complete model.
    """

    prefix: str
    modules: tuple[tuple[str, str], ...]
    config: Any = field(default=None, compare=False)

    def to_complete(self, name: str) -> str:
        """Return the name in the complete model of a module or parameter of the view.

        A name of the language model in the complete model is returned unchanged.
        """
        if _contains(self.prefix, name):
            return name
        matching = ((view, complete) for view, complete in self.modules if _contains(view, name))
        return next((complete + name[len(view) :] for view, complete in matching), name)

    def from_complete(self, name: str) -> str | None:
        """Return the name in the view of a module or parameter of the complete model, or None if the view lacks it."""
        matching = ((view, complete) for view, complete in self.modules if _contains(complete, name))
        return next((view + name[len(complete) :] for view, complete in matching), None)

    def is_language(self, name: str) -> bool:
        """Return True if a module or parameter of the view belongs to the language model or its head."""
        complete = self.to_complete(name)
        return _contains(self.prefix, complete) or complete == name

    def with_module(self, name: str, complete_name: str) -> NameMap:
        """Return the map of a view with an additional module, such as the connector."""
        return replace(self, modules=((name, complete_name), *self.modules))


def _contains(prefix: str, name: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")


def complete_names(model: nn.Module) -> NameMap | None:
    """Return the names of a text view in its complete model, or None for an ordinary model."""
    return vars(model).get(_ATTRIBUTE)


def set_complete_names(view: nn.Module, names: NameMap) -> None:
    """Set the result of :func:`complete_names`."""
    vars(view)[_ATTRIBUTE] = names
