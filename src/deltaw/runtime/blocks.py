"""The blocks of a model: the one list of like modules that its input goes through."""

from __future__ import annotations

from torch import nn


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and list of the model's blocks; None where it has no such list.

    Found by structure: of all lists of modules the one with the most parameters, lists inside of its own
    blocks (experts) left out, since they have fewer.
    """
    found: tuple[str, nn.ModuleList] | None = None
    most = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > most:
            found, most = (name, module), size
    return found
