"""The low-rank update ΔW = scaling · A·B of frozen weights, as a method."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from deltaw.lora import LoRAConfig, LoRALayer, adapter_parameters, attach, load_adapter, save_adapter


class LoRA:
    """Train A and B beside the frozen weights, and whole modules where asked (``lora.train_modules``)."""

    name = "lora"

    def __init__(self, config: LoRAConfig) -> None:
        self.config = config

    def prepare(self, model: nn.Module, *, seed: int) -> str:
        summary = attach(model, self.config, seed=seed)
        # The adapter alone: the model's own dropout is no part of the method and stays off.
        _draw(model, True)
        return str(summary)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        _draw(model, False)
        try:
            yield
        finally:
            _draw(model, True)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return adapter_parameters(model)

    def save(self, model: nn.Module, folder: str | os.PathLike[str], *, base_model: str) -> None:
        save_adapter(model, Path(folder), base_model=base_model)

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        return str(load_adapter(model, Path(folder)))

    def can_share_prefixes(self) -> bool:
        """Dropout draws a mask for each token: rows that share tokens would share their masks too."""
        return self.config.dropout == 0


def _draw(model: nn.Module, dropout: bool) -> None:
    """Switch the adapter's dropout on or off."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.training = dropout
