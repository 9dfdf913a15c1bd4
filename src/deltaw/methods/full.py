"""Train every parameter: what the other methods are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaw.methods.in_place import InPlace
from deltaw.methods.places import names_of


class Full(InPlace):
    """Train everything. In bf16 the optimizer works on fp32 copies, since small updates vanish in bf16."""

    name = "full"
    usual_rate = 2e-5

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        return list(names_of(model))
