"""Adapter folders with random factors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from deltaw.lora import LoRAConfig, adapter_parameters, attach, detach, save_adapter
from deltaw.methods.prompt import PromptFile, write_prompt


def write_lora(model: nn.Module, folder: Path, *, seed: int = 0, size: float = 0.2, **settings) -> Path:
    """Save an adapter with normally distributed factors of scale ``size``. The model is left unchanged."""
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8, "target_modules": "all-linear", **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    save_adapter(model, folder, base_model="tiny")
    detach(model)
    return folder


def write_soft_prompt(model: PreTrainedModel, folder: Path, *, seed: int = 0, length: int = 3) -> Path:
    """Save a normally distributed soft prompt for ``model``."""
    shape = (length, model.get_input_embeddings().weight.shape[1])
    prompt = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    write_prompt(folder, PromptFile(prompt, {}, base_model="tiny", task_type="CAUSAL_LM"), {})
    return folder
