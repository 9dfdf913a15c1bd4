"""Train a random subset of the weights, as many as asked for, spread evenly over all parameters.

Gradients, optimizer state and the saved file exist for the chosen weights alone (see ``subset``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from deltaw.errors import UserError
from deltaw.lora.places import ParameterPlace
from deltaw.methods.in_place import SubsetInPlace
from deltaw.methods.parameters import inside, names_of, train_places
from deltaw.methods.settings import RandomSettings


class Random(SubsetInPlace):
    """Train ``random.weights`` of the model's weights."""

    name = "random"
    usual_rate = 5e-4

    def __init__(self, settings: RandomSettings | None = None) -> None:
        super().__init__(settings or RandomSettings())
        self.weights = (settings or RandomSettings()).weights

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        extra = set(inside(extra_modules, names_of(model)))
        return [name for name in names_of(model) if name not in extra]

    def start(self, model: nn.Module, extra_modules: Sequence[str], seed: int) -> list[ParameterPlace]:
        extra = inside(extra_modules, names_of(model))
        places = train_places(model, [*self.chosen(model, extra_modules), *extra])
        spread = [place for place in places if place.name not in extra]
        counts = self._counts([place.current.numel() for place in spread])
        rng = np.random.default_rng([seed, 3])
        for place, count in zip(spread, counts, strict=True):
            if count:
                drawn = rng.choice(place.current.numel(), size=count, replace=False, shuffle=False)
                self._subset.begin(place, torch.from_numpy(np.sort(drawn).astype(np.int32)))
            else:
                place.current.requires_grad_(False)
        return [place for place in places if place.name in extra]

    def summary(self, model: nn.Module, total: int, extra_modules: Sequence[str]) -> str:
        count = len(self._subset)
        extra = sum(place.current.numel() for place in self._places)
        text = f"random: {count:,} of {total:,} weights trained ({count / total:.2%})"
        return text + (f", and {extra:,} of {', '.join(extra_modules)}" if extra else "")

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
