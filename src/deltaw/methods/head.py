"""Train the output layer alone, everything below it frozen.

No gradient flows through the backbone, and none of its activations are kept: it is a frozen prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaw.methods.in_place import InPlace
from deltaw.methods.parameters import inside, modules_named, names_of
from deltaw.methods.settings import HeadSettings


class Head(InPlace):
    """Train ``head.modules``, by default the model's output layer."""

    name = "head"
    usual_rate = 1e-3

    def __init__(self, settings: HeadSettings | None = None) -> None:
        super().__init__(settings or HeadSettings())
        self.modules = (settings or HeadSettings()).modules

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        if self.modules:
            return inside(modules_named(model, self.modules, "head.modules"), names_of(model))
        if extra_modules:
            return []  # a classifier, which every method trains, is the head itself
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if head is None:
            return []
        return inside([name for name, module in model.named_modules() if module is head], names_of(model))
