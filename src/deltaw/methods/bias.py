"""Train the biases alone (BitFit, arXiv 2106.10199).

Newer models have none. There, each linear layer but the head gets a bias of zeros first, which changes
nothing until it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaw.lora.kinds import is_linear
from deltaw.lora.places import ParameterPlace
from deltaw.methods.in_place import InPlace
from deltaw.methods.parameters import add_biases, inside, names_of, train_places


class Bias(InPlace):
    """Train every parameter named ``bias``."""

    name = "bias"
    usual_rate = 5e-4

    def __init__(self, settings: object = None) -> None:
        super().__init__(settings)
        self._added = 0

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        extra = set(inside(extra_modules, names_of(model)))
        return [n for n in names_of(model) if n.rpartition(".")[2] == "bias" and n not in extra]

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        if self.chosen(model, extra_modules):
            return super().start(model, extra_modules, seed)
        places = train_places(model, inside(extra_modules, names_of(model)))
        added = add_biases(model, _linear_layers(model, extra_modules))
        self._added = len(added)
        return [*places, *added]

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        text = super().summary(model, total, extra_modules)
        if not self._added:
            return text
        return f"{text}\n  note: the model has no biases; {self._added} linear layers were given one of zeros"


def _linear_layers(model: nn.Module, extra_modules: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The linear layers below the output head."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    excluded = tuple(extra_modules)
    return [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and not any(name == other or name.startswith(f"{other}.") for other in excluded)
    ]
