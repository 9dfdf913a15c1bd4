"""Train the last blocks, everything below them frozen: the backward pass ends at the lowest of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaw.errors import UserError
from deltaw.methods.in_place import InPlace
from deltaw.methods.parameters import inside, names_of
from deltaw.methods.settings import LastSettings
from deltaw.runtime.blocks import blocks_of


class Last(InPlace):
    """Train ``last.blocks`` blocks, counted from the top."""

    name = "last"
    usual_rate = 5e-5

    def __init__(self, settings: LastSettings | None = None) -> None:
        super().__init__(settings or LastSettings())
        self.blocks = (settings or LastSettings()).blocks

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        found = blocks_of(model)
        if found is None:
            raise UserError(
                f"a {type(model).__name__} has no list of blocks",
                where="method",
                hint="choose another method",
            )
        name, blocks = found
        if self.blocks > len(blocks):
            raise UserError(
                f"last.blocks asks for {self.blocks} blocks, and the model has {len(blocks)}",
                where="last.blocks",
                hint=f"give at most {len(blocks)}",
            )
        return inside([f"{name}.{i}" for i in range(len(blocks) - self.blocks, len(blocks))], names_of(model))
