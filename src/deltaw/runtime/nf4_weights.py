"""Frozen weights rounded to NF4 (arXiv 2305.14314): which layers, one after another.

The linear layers of the model's blocks are taken; embeddings, norms and the head stay as they are. Each
layer's own weight is given back as soon as its blocks stand, so a model whose weights are mapped from its
files never stands whole in both forms.

Knows modules; not data files or training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from deltaw.kernels.block_formats import quantize_nf4 as rounded_nf4
from deltaw.lora.kinds import PLAIN_LINEAR_CLASSES
from deltaw.lora.layers import LoRALinear
from deltaw.lora.layers_blocks import can_be_nf4, in_nf4
from deltaw.runtime.blocks import blocks_of
from deltaw.runtime.int8_weights import give_back


@dataclass
class Nf4Report:
    """What was done: how many layers the blocks have, and the names of those that keep their weights."""

    layers: int = 0
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.layers:
            return "no linear layer stands in the blocks, so no weight is rounded to NF4"
        said = f"{self.layers - len(self.kept)} of {self.layers} layers are in NF4"
        if self.kept:
            more = f" and {len(self.kept) - 3} more" if len(self.kept) > 3 else ""
            said += f"; their inputs are no multiple of 64: {', '.join(self.kept[:3])}{more}"
        return said


def quantize_nf4(model: nn.Module) -> Nf4Report:
    """Put layers with weights in NF4 in the place of the blocks' linear layers.

    Args:
        model: frozen, without adapters.
    """
    report = Nf4Report()
    for module, child, layer, name in _linear_layers(model):
        report.layers += 1
        if not can_be_nf4(layer):
            report.kept.append(name)
            continue
        setattr(module, child, in_nf4(layer))
        give_back(layer.weight)
    return report


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> int:
    """Give the blocks' linear layers, in place, the numbers that NF4 makes of their weights in bf16.

    Args:
        model: frozen; adapters on it stay as they are.

    Returns:
        how many layers.
    """
    count = 0
    for _, _, layer, _ in _linear_layers(model, adapted=True):
        if can_be_nf4(layer):
            layer.weight.copy_(rounded_nf4(layer.weight.to(torch.bfloat16)).dequantized(torch.bfloat16))
            count += 1
    return count


def _linear_layers(
    model: nn.Module, adapted: bool = False
) -> Iterator[tuple[nn.Module, str, nn.Linear, str]]:
    """The linear layers of the blocks: who holds each, by which name; the layer, and its whole name."""
    found = blocks_of(model)
    if found is None:
        return
    prefix, blocks = found
    for name, module in list(blocks.named_modules()):
        for child, layer in list(module.named_children()):
            known = type(layer) is nn.Linear or type(layer).__name__ in PLAIN_LINEAR_CLASSES
            if not known and not (adapted and type(layer) is LoRALinear):
                continue
            assert isinstance(layer, nn.Linear)
            yield module, child, layer, ".".join(filter(None, (prefix, name, child)))
