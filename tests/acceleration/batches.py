"""Batches and PEFT models for tests of acceleration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.tiny_models import causal_model


def padded_batch(vocabulary: int, *, left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Return four rows of different lengths, of which two share ten tokens, with labels after the sixth token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (4, 24), generator=generator)
    tokens[1, :10] = tokens[0, :10]
    mask = torch.ones_like(tokens)
    mask[1, 20:] = 0
    mask[2, 9:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    if not left:
        return batch
    order = mask.argsort(dim=1, stable=True)  # padding first
    return {name: values.gather(1, order) for name, values in batch.items()}


def peft_model(family: str = "llama", *, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
    """Return a tiny language model with PEFT's LoRA, of which B is not zero, in training mode."""
    return adapted(causal_model(family).to(dtype), **settings)


def adapted(model: PreTrainedModel, **settings: Any) -> PeftModel:
    """Add PEFT's LoRA, of which B is not zero, to a model, and set training mode."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    config = LoraConfig(**options)
    result = get_peft_model(model, config)
    fill_factors(result)
    return result.train()


def fill_factors(model: nn.Module, seed: int = 0) -> None:
    """Give all B random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch and the gradient of each trained parameter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(loss), gradients


def assert_equal_gradients(
    model: nn.Module, batch: dict[str, Tensor], expected: tuple[float, dict[str, Tensor]], tolerance: float = 1e-5
) -> None:
    """Compare loss and gradients of a batch with those of :func:`loss_and_gradients`."""
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(expected[0], rel=tolerance)
    assert largest_difference(gradients, expected[1]) < tolerance


def largest_difference(computed: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of gradients, relative to the largest value of all."""
    assert computed.keys() == expected.keys()
    size = max(float(values.abs().max()) for values in expected.values())
    return max(float((computed[name] - expected[name]).abs().max()) for name in expected) / size
