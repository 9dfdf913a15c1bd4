"""Train the output layer alone, everything below it frozen.

No gradient flows through the backbone, and none of its activations are kept: it is a frozen prefix.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaw.methods.in_place import InPlace
from deltaw.methods.places import inside, modules_named, names_of
from deltaw.methods.settings import HeadSettings


class Head(InPlace):
    """Train ``head.modules``, by default the layer that gives the model's outputs."""

    name = "head"
    usual_rate = 1e-3

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings)
        self.modules = settings.modules

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        if self.modules:
            return inside(modules_named(model, self.modules, "head.modules"), names_of(model))
        if extra_modules:
            return []  # the classifier, which is trained beside any method, is the head
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        return (
            []
            if head is None
            else inside([n for n, m in model.named_modules() if m is head], names_of(model))
        )
