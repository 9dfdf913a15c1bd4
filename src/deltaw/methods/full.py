"""Train every parameter: the baseline that the other methods are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from deltaw.methods.in_place import InPlace
from deltaw.methods.parameters import names_of


class Full(InPlace):
    """Train everything. A bf16 model has fp32 master weights, since small updates vanish in bf16."""

    name = "full"
    usual_rate = 2e-5

    def chosen(self, model: nn.Module, extra_modules: Sequence[str]) -> list[str]:
        return list(names_of(model))
