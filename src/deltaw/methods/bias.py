"""Train the biases alone (BitFit, arXiv 2106.10199).

Newer models have none: there, each linear layer but the head is given one of zeros first, which changes
nothing until it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from deltaw.lora.kinds import is_linear
from deltaw.methods.in_place import InPlace
from deltaw.methods.places import Place, add_biases, inside, names_of, train_places


class Bias(InPlace):
    """Train every parameter named ``bias``."""

    name = "bias"
    usual_rate = 5e-4

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        return [name for name in names_of(model) if name.rpartition(".")[2] == "bias"]

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        heads = inside(extra_modules, names_of(model))
        chosen = [name for name in self.chosen(model, extra_modules) if name not in heads]
        if chosen:
            return super().prepare(model, seed=seed, extra_modules=extra_modules)
        total = sum(p.numel() for p in model.parameters())
        places: list[Place] = train_places(model, heads)
        bare = _linear_layers(model, extra_modules)
        self._places = [*places, *add_biases(model, bare)]
        note = f"\n  note: the model has no biases; {len(bare)} linear layers were given one of zeros"
        return self.summary(model, total) + note


def _linear_layers(model: nn.Module, extra_modules: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """The linear layers below the output head."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    left_out = tuple(extra_modules)
    return [
        (name, module)
        for name, module in model.named_modules()
        if is_linear(module)
        and module is not head
        and not any(name == other or name.startswith(f"{other}.") for other in left_out)
    ]
