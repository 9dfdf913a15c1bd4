"""The low-rank update ΔW = scaling · A·B of frozen weights, as a method."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from deltaw.errors import UserError
from deltaw.lora import (
    LoRAConfig,
    LoRALayer,
    adapter_parameters,
    attach,
    disabled,
    initialize_from_activations,
    is_factor_B,
    load_adapter,
    save_adapter,
)


class LoRA:
    """Train A and B beside the frozen weights, and whole modules where asked (``lora.train_modules``).

    Args:
        config: rank, alpha, targets and the rest.
        b_rate: what the learning rate of B is multiplied with (LoRA+, arXiv 2402.12354).
    """

    name = "lora"
    usual_rate = 2e-4
    falls_with_width = True
    virtual_tokens = 0

    def __init__(self, config: LoRAConfig, b_rate: float = 1.0) -> None:
        self.config = config
        self.b_rate = b_rate

    def prepare(
        self,
        model: nn.Module,
        *,
        seed: int,
        extra_modules: Sequence[str] = (),
        calibrate: Callable[[], None] | None = None,
    ) -> str:
        wholes = [name for name in extra_modules if name not in (self.config.train_modules or ())]
        config = self.config
        if wholes:
            config = dataclasses.replace(config, train_modules=[*(config.train_modules or ()), *wholes])
        said = str(attach(model, config, seed=seed))
        if config.init == "eva":
            if calibrate is None:
                raise UserError(
                    "init 'eva' needs rows to look at", where="lora.init", hint="use init 'uniform'"
                )
            said += f"\n{initialize_from_activations(model, calibrate, seed=seed)}"
        # The adapter alone: the model's own dropout is no part of the method and stays off.
        _draw(model, True)
        return said

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        _draw(model, False)
        try:
            yield
        finally:
            _draw(model, True)

    def without(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return disabled(model)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return adapter_parameters(model)

    def rate_factor(self, name: str) -> float:
        return self.b_rate if is_factor_B(name) else 1.0

    def after_step(self, model: nn.Module) -> None:
        """Nothing: the layers compute with the very tensors that the optimizer changes."""

    def with_virtual_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def save(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        base_model: str,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        save_adapter(model, Path(folder), base_model=base_model, metadata=metadata)

    def load(self, model: nn.Module, folder: str | os.PathLike[str]) -> str:
        return f"{load_adapter(model, Path(folder)).adapted} layers are adapted by {folder}"

    def can_share_prefixes(self) -> bool:
        """Dropout draws a mask for each token: rows that share tokens would share their masks too."""
        return self.config.dropout == 0


def _draw(model: nn.Module, dropout: bool) -> None:
    """Switch the adapter's dropout on or off."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.training = dropout
