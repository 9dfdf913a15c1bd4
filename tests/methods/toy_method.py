"""A user-defined method that trains the norms of the upper blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from deltaw.errors import UserError
from deltaw.methods.in_place import InPlace
from deltaw.settings.method_registry import MethodEntry


@dataclass(frozen=True)
class NormsSettings:
    """The ``norms:`` section."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    above: int = field(default=0, metadata={"description": "the lowest block whose norms are trained"})

    def __post_init__(self) -> None:
        if self.above < 0:
            raise UserError(f"norms.above is {self.above}", hint="give a block's number, from 0")


class Norms(InPlace):
    """Train the norms of the blocks from ``norms.above`` on."""

    name = "norms"
    default_learning_rate = 2e-3
    settings: NormsSettings

    def parameter_names(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        names = [name for name, _ in model.named_parameters() if "norm" in name and ".layers." in name]
        blocks = [int(name.partition(".layers.")[2].partition(".")[0]) for name in names]
        above = (self.settings or NormsSettings()).above
        return [name for name, block in zip(names, blocks, strict=True) if block >= above]


ENTRY = MethodEntry(
    "norms", Norms, NormsSettings, "the norms of the blocks", search=("norms.above=[0, 1]",), compared_by_default=True
)
