"""The low-rank update ΔW = scaling · A·B of frozen weights, as a method."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

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
from deltaw.lora.attachment import attached
from deltaw.methods.base import Calibration, Folder, Metadata, Method, TrainOptions


class LoRA(Method):
    """Train A and B of ΔW = scaling · A·B, and extra modules where asked (``lora.train_modules``).

    Args:
        config: rank, alpha, targets and the rest.
        b_rate: the factor on the learning rate of B (LoRA+, arXiv 2402.12354).
    """

    name = "lora"
    usual_rate = 2e-4

    def __init__(self, config: LoRAConfig | None = None, b_rate: float = 1.0) -> None:
        self.config = config or LoRAConfig()
        super().__init__(self.config)
        self.b_rate = b_rate

    @classmethod
    def from_run(
        cls, section: object, *, train: TrainOptions | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> LoRA:
        config = section if isinstance(section, LoRAConfig) else None
        return cls(config, 1.0 if train is None else train.b_rate)

    @property
    def activates(self) -> bool:  # type: ignore[override]
        """Whether the adapter acts from an invocation sequence on (arXiv 2504.12397)."""
        return self.config.activation == "completion"

    @property
    def invocation_given(self) -> Sequence[int] | str | None:  # type: ignore[override]
        """As the settings have it."""
        return self.config.invocation_tokens

    @property
    def invocation(self) -> Sequence[int] | None:  # type: ignore[override]
        """The sequence as token ids, once it is known."""
        tokens = self.config.invocation_tokens
        return tokens if isinstance(tokens, list) else None

    def invoke_by(self, tokens: Sequence[int]) -> None:
        """Take the invocation sequence."""
        self.config = dataclasses.replace(self.config, invocation_tokens=list(tokens))

    def prepare(
        self, model: nn.Module, *, seed: int, extra_modules: Sequence[str] = (), calibrate: Calibration | None = None
    ) -> str:
        config = self.config
        if extra := [name for name in extra_modules if name not in config.train_modules]:
            config = dataclasses.replace(config, train_modules=[*config.train_modules, *extra])
        said = str(attach(model, config, seed=seed))
        if config.init == "eva":
            if calibrate is None:
                raise UserError("init 'eva' needs calibration rows", where="lora.init", hint="use init 'uniform'")
            said += f"\n{initialize_from_activations(model, calibrate, seed=seed)}"
        # Only the adapter's dropout is on. The model's own is no part of the method and stays off.
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

    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        save_adapter(model, Path(folder), base_model=base_model, metadata=metadata)

    def load(self, model: nn.Module, folder: Folder) -> str:
        adapted = load_adapter(model, Path(folder)).adapted
        self.config = attached(model).config
        said = f"{adapted} layers are adapted by {folder}"
        return f"{said}, from {list(self.invocation)} on" if self.invocation is not None else said

    def can_share_prefixes(self) -> bool:
        """Not with dropout: rows that share tokens would share their dropout masks. An activated adapter
        does not act on what rows share."""
        return self.config.dropout == 0 or self.activates


def _draw(model: nn.Module, dropout: bool) -> None:
    """Switch the adapter's dropout on or off."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.training = dropout
