"""Tiny base models and adapters on disk, for the tests of merging."""

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


def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def base_folder(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **save: object) -> Path:
    """A family's tiny model, saved."""
    quiet()
    causal_model(family).to(dtype).save_pretrained(folder, **save)
    return folder


def text_base(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A tiny Llama with a byte tokenizer, saved."""
    quiet()
    tiny_llama(**{"initializer_range": 0.1, **changes}).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    quiet()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def moved(model: nn.Module, seed: int = 0, size: float = 0.1) -> nn.Module:
    """The model with every trained number of its adapter moved away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def adapter_folder(base: Path, folder: Path, *, seed: int = 0, size: float = 0.1, **settings: object) -> Path:
    """A LoRA adapter on a base, whose factors are all other than zero."""
    model = loaded(base)
    attach(model, LoRAConfig(**{"rank": 4, "alpha": 8, **settings}), seed=seed)
    save_adapter(moved(model, seed, size), folder, base_model=str(base))
    return folder


def pair(base: Path, adapter: Path) -> PreTrainedModel:
    """The unmerged model in fp32."""
    model = loaded(base)
    load_adapter(model, adapter)
    return model


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens).logits.float()


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest logit."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_merged(base: Path, adapter: Path, out: Path, least: float = 1e-5) -> None:
    """The merged model in ``out`` computes what base and adapter do, which is not what the base does alone."""
    expected = logits(pair(base, adapter))
    assert off(logits(loaded(base)), expected) > 1e-4, "the adapter must do something"
    assert off(logits(loaded(out)), expected) < least


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())
