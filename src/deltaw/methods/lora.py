"""LoRA as a training method."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
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
from deltaw.lora.attachment import require_attachment
from deltaw.lora.files import first_directions, rank_dimension
from deltaw.lora.starting import attach_from, save_new_directions
from deltaw.methods.base import VISION_TOWER, Calibration, Folder, Metadata, Method, MethodOptions, Names, Start
from deltaw.tensor_files import has_values

# Subfolder of only the new adapter, if it was stacked on another one and ``stack: keep`` is set.
NEW_ADAPTER = "new_adapter"


class LoRA(Method):
    """Train A and B of ΔW = scaling · A·B, and the extra modules in ``lora.train_modules``.

    Args:
        config: Settings of the adapter.
        loraplus_lr_ratio: Learning rate multiplier of B (LoRA+, arXiv 2402.12354).
    """

    name = "lora"
    default_learning_rate = 2e-4

    def __init__(self, config: LoRAConfig | None = None, loraplus_lr_ratio: float = 1.0) -> None:
        self._set_config(config or LoRAConfig())
        super().__init__(self.config)
        self._frozen: list[tuple[Tensor, Tensor]] = []
        self._new_from: int | None = None
        self.loraplus_lr_ratio = loraplus_lr_ratio

    @classmethod
    def from_run(cls, section: object, train: MethodOptions | None, tokenizer: PreTrainedTokenizerBase | None) -> LoRA:
        config = section if isinstance(section, LoRAConfig) else None
        return cls(config, 1.0 if train is None else train.loraplus_lr_ratio)

    def _set_config(self, config: LoRAConfig) -> None:
        self.config = config
        self.is_activated = config.active == "completion"
        tokens = config.invocation_tokens
        self.requested_invocation = tokens
        self.invocation = tokens if isinstance(tokens, list) else None

    @property
    def trained_modules(self) -> Sequence[str]:
        return [*self.config.train_modules, *([VISION_TOWER] if self.config.vision_tower else [])]

    def set_invocation(self, tokens: Sequence[int]) -> None:
        self._set_config(dataclasses.replace(self.config, invocation_tokens=list(tokens)))

    def prepare(self, model: nn.Module, *, seed: int, extra_modules: Names = (), calibrate: Calibration = None) -> str:
        config = self.config
        if extra := [name for name in extra_modules if name not in config.train_modules]:
            config = dataclasses.replace(config, train_modules=[*config.train_modules, *extra])
        summary = str(attach(model, config, seed=seed))
        if config.init == "eva":
            if calibrate is None:
                raise UserError("init 'eva' needs calibration rows", location="lora.init", hint="use init 'uniform'")
            summary += f"\n{initialize_from_activations(model, calibrate, seed=seed)}"
        # Only the adapter's dropout is enabled. The base model's dropout is not part of the method.
        _set_dropout(model, True)
        return summary

    def prepare_from(self, model: nn.Module, start: Start, *, seed: int, extra_modules: Names = ()) -> str:
        dry_run = not all(map(has_values, model.parameters()))
        adapter, config = start.lora(self.config, dry_run=dry_run)
        summary, ranks = attach_from(model, adapter, config, start.location, seed=seed, new_modules=extra_modules)
        start.require_base(require_attachment(model).fingerprint)
        _set_dropout(model, True)
        if not start.is_stacked:
            fresh = config.rank - adapter.config.rank
            return f"{summary}\n  {fresh} new directions, which start at zero" if fresh else str(summary)
        self._freeze_directions(model, ranks)
        self._new_from = _common_rank(ranks, start) if start.keeps_new else None
        return f"{summary}\n  {sum(value.numel() for _, value in self._frozen):,} parameters of start_from are frozen"

    def _freeze_directions(self, model: nn.Module, ranks: Mapping[str, int]) -> None:
        """Keep the first directions of each layer unchanged, without gradient."""
        for name, layer in require_attachment(model).adapted():
            for attribute in ("lora_A", "lora_B"):
                frozen = first_directions(layer, attribute, ranks[name]).detach()
                self._frozen.append((frozen, frozen.clone()))
                clear = functools.partial(_clear_gradient, layer, attribute, ranks[name])
                getattr(layer, attribute).register_post_accumulate_grad_hook(clear)

    def after_step(self, model: nn.Module) -> None:
        for view, value in self._frozen:  # weight decay changes a parameter without a gradient
            view.copy_(value)

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        _set_dropout(model, False)
        try:
            yield
        finally:
            _set_dropout(model, True)

    def base_model_active(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return disabled(model)

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return adapter_parameters(model)

    def rate_factor(self, name: str) -> float:
        return self.loraplus_lr_ratio if is_factor_B(name) else 1.0

    def save(self, model: nn.Module, folder: Folder, *, base_model: str, metadata: Metadata | None = None) -> None:
        save_adapter(model, Path(folder), base_model=base_model, metadata=metadata)
        if self._new_from is not None:
            save_new_directions(model, Path(folder) / NEW_ADAPTER, self._new_from, base_model=base_model)

    def load(self, model: nn.Module, folder: Folder) -> str:
        adapted = load_adapter(model, Path(folder)).adapted
        self._set_config(require_attachment(model).config)
        active = "" if self.invocation is None else f", active from {list(self.invocation)} on"
        return f"{adapted} layers are adapted by {folder}{active}"

    def can_share_prefixes(self) -> bool:
        """True without dropout, since rows that share tokens would share their dropout masks.

        Always True for an activated adapter, which does not act on shared prefixes.
        """
        return self.config.dropout == 0 or self.is_activated


def _clear_gradient(layer: LoRALayer, attribute: str, rank: int, parameter: Tensor) -> None:
    """Set the gradient of the first directions to zero."""
    if parameter.grad is not None:
        parameter.grad.narrow(rank_dimension(layer, attribute), 0, rank).zero_()


def _common_rank(ranks: Mapping[str, int], start: Start) -> int:
    """Return the rank of the stacked adapters, which must be the same in all layers."""
    if len(set(ranks.values())) > 1:
        message = "stack: keep needs adapters with the same rank in all layers"
        raise UserError(message, location=start.location, hint="set stack: merge")
    return next(iter(ranks.values()))


def _set_dropout(model: nn.Module, dropout: bool) -> None:
    """Enable or disable the adapter's dropout."""
    for module in model.modules():
        if isinstance(module, LoRALayer):
            module.training = dropout
