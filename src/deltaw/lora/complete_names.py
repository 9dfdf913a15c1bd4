"""Names of the modules of a text view in the complete model that the view was taken from.

A text view is the causal language model of a vision-language model. Adapter files contain the names of the complete
model, so that other programs load them on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_ATTRIBUTE = "_deltaw_complete_names"


@dataclass(frozen=True)
class NameMap:
    """Maps names of modules and parameters between a text view and its complete model.

    Attributes:
        view_prefix: Name of the language model in the view, for example ``model``.
        prefix: Name of the language model in the complete model, for example ``model.language_model``.
        others: Other children of the view, such as ``lm_head``. They have the same names in the complete model.
        class_name: Class of the complete model.
    """

    view_prefix: str
    prefix: str
    others: tuple[str, ...]
    class_name: str

    def to_complete(self, name: str) -> str:
        """Return the name in the complete model of a module or parameter of the view.

        A name of the language model in the complete model is returned unchanged.
        """
        if _with_prefix(name, self.prefix, "") is not None:
            return name
        return _with_prefix(name, self.view_prefix, self.prefix) or name

    def from_complete(self, name: str) -> str | None:
        """Return the name in the view of a module or parameter of the complete model, or None if the view lacks it."""
        view_name = _with_prefix(name, self.prefix, self.view_prefix)
        return name if view_name is None and name.partition(".")[0] in self.others else view_name


def _with_prefix(name: str, prefix: str, replacement: str) -> str | None:
    """Return ``name`` with another prefix, or None if it does not have this prefix."""
    return replacement + name[len(prefix) :] if f"{name}.".startswith(f"{prefix}.") else None


def complete_names(model: nn.Module) -> NameMap | None:
    """Return the names of a text view in its complete model, or None for an ordinary model."""
    return vars(model).get(_ATTRIBUTE)


def set_complete_names(view: nn.Module, names: NameMap) -> None:
    """Set the result of :func:`complete_names`."""
    vars(view)[_ATTRIBUTE] = names
