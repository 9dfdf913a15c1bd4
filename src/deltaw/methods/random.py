"""Train a random subset of the weights, as many as asked, spread evenly over all parameters.

Gradients, optimizer state and the saved file exist for the chosen weights alone (see ``subset``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deltaw.errors import UserError
from deltaw.methods.in_place import InPlace
from deltaw.methods.places import Place, inside, names_of, train_places
from deltaw.methods.settings import RandomSettings
from deltaw.methods.subset import Subset


class Random(InPlace):
    """Train ``random.weights`` of the model's weights."""

    name = "random"
    usual_rate = 5e-4

    def __init__(self, settings: RandomSettings) -> None:
        super().__init__(settings)
        self.weights = settings.weights
        self._subset = Subset()

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        heads = set(inside(extra_modules, names_of(model)))
        return [name for name in names_of(model) if name not in heads]

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        heads = inside(extra_modules, names_of(model))
        places = train_places(model, [*self.chosen(model, extra_modules), *heads])
        self._places = [place for place in places if place.name in heads]
        spread = [place for place in places if place.name not in heads]
        counts = self._counts([place.now.numel() for place in spread])
        rng = np.random.default_rng([seed, 3])
        for place, count in zip(spread, counts, strict=True):
            if count:
                drawn = rng.choice(place.now.numel(), size=count, replace=False, shuffle=False)
                self._subset.begin(place, torch.from_numpy(np.sort(drawn).astype(np.int32)))
            else:
                place.now.requires_grad_(False)
        total = sum(p.numel() for p in model.parameters())
        extra_count = sum(place.now.numel() for place in self._places)
        text = f"random: {len(self._subset):,} of {total:,} weights trained ({len(self._subset) / total:.2%})"
        return text + (f", and {extra_count:,} of {', '.join(extra_modules)}" if extra_count else "")

    def _counts(self, sizes: list[int]) -> list[int]:
        """How many weights of each parameter: proportional to its size, and exactly as many as asked."""
        total = sum(sizes)
        wanted = round(self.weights * total) if self.weights < 1 else int(self.weights)
        if not 1 <= wanted <= total:
            raise UserError(
                f"random.weights asks for {wanted:,} weights, and there are {total:,}",
                where="random.weights",
                hint="give a share below 1, or a smaller number",
            )
        ends = [wanted * end // total for end in np.cumsum(np.asarray(sizes, dtype=object))]
        return [int(end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return [*super().parameters(model), *self._subset.parameters()]

    def after_step(self, model: nn.Module) -> None:
        self._subset.write()

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return self._subset.without(super().without(model))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **self._subset.tensors()}

    def put(
        self, model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, Sequence[str]], where: str
    ) -> list[Place]:
        model.requires_grad_(False)
        return super().put(model, self._subset.put(model, tensors, where), tied, where)
