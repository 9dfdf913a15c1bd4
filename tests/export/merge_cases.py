"""Tiny base models and adapters on disk for the merge tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaw.lora import LoRAConfig, adapter_parameters, attach, load_adapter, save_adapter
from tests.byte_models import byte_tokenizer, tiny_llama
from tests.tiny_models import VOCABULARY, causal_model

TOKENS = torch.arange(3, 43).view(2, 20) % VOCABULARY


def silence_transformers() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def base_folder(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """Save the tiny model of a family."""
    silence_transformers()
    causal_model(family).to(dtype).save_pretrained(folder, **save)
    return folder


def text_base(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Save a tiny Llama with a byte tokenizer."""
    silence_transformers()
    tiny_llama(**{"initializer_range": 0.1, **changes}).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    silence_transformers()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def perturb_adapter(model: nn.Module, seed: int = 0, size: float = 0.1) -> nn.Module:
    """Add noise to every trained parameter of the adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def adapter_folder(base: Path, folder: Path, *, seed: int = 0, size: float = 0.1, **settings: object) -> Path:
    """Save a LoRA adapter of a base whose factors are all nonzero."""
    model = load_model(base)
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8, **settings}), seed=seed)
    save_adapter(perturb_adapter(model, seed, size), folder, base_model=str(base))
    return folder


def load_adapted(base: Path, adapter: Path) -> PreTrainedModel:
    """Load the base with the unmerged adapter, in fp32."""
    model = load_model(base)
    load_adapter(model, adapter)
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.float()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_merged(base: Path, adapter: Path, out: Path, tolerance: float = 1e-5) -> None:
    """Check that the merged model in ``out`` computes the logits of base and adapter, which differ from the base's."""
    expected = logits(load_adapted(base, adapter))
    assert relative_difference(logits(load_model(base)), expected) > 1e-4, "the adapter has no effect"
    assert relative_difference(logits(load_model(out)), expected) < tolerance


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def read_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())
