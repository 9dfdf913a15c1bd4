"""Small models with peaks of megabytes, and a function that runs two training steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from deltaw.lora import LoRAConfig, LoRALayer, attach

VOCABULARY = 2000
END = {"bos_token_id": 1, "eos_token_id": 2}
IDS = {"pad_token_id": 0, **END}
GEMMA = {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 32}
LAYERS = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE = {**LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 512}

CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, **IDS, num_key_value_heads=2),
    "tied llama": lambda: transformers.LlamaConfig(**SHAPE, **IDS, tie_word_embeddings=True),
    "gemma": lambda: transformers.Gemma3TextConfig(**SHAPE, **IDS, **GEMMA),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=3, n_head=4, **END),
    "bert": lambda: transformers.BertConfig(**SHAPE, num_labels=5),
    "vit": lambda: transformers.ViTConfig(**LAYERS, image_size=64, patch_size=8, num_labels=5),
}
AUTO = {"bert": transformers.AutoModelForSequenceClassification, "vit": transformers.AutoModelForImageClassification}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_of(family: str, dtype: str) -> PreTrainedModel:
    """Create a frozen random model in eval mode. In a simulation its tensors are fake."""
    torch.manual_seed(0)
    auto = AUTO.get(family, transformers.AutoModelForCausalLM)
    return auto.from_config(CONFIGS[family](), dtype=DTYPES[dtype]).eval().requires_grad_(False)


def prepare_model(family: str, dtype: str, method: str, checkpointing: bool = False) -> PreTrainedModel:
    model = model_of(family, dtype)
    if method == "full":
        model.requires_grad_(True)
    else:
        dropout = 0.1 if method == "lora with dropout" else 0.0
        attach(model, LoRAConfig(rank=4, target_modules="all-linear", dropout=dropout), seed=0)
        for module in model.modules():
            module.training = isinstance(module, LoRALayer)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            module.training |= isinstance(module, transformers.modeling_layers.GradientCheckpointingLayer)
    return model


def two_steps(model: PreTrainedModel, rows: int = 6, length: int = 70) -> Callable[[], None]:
    """Return a function that runs two AdamW steps on padded rows or images.

    Low-precision parameters get fp32 master weights.
    """

    def run() -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        master_weights = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in trained]
        low_precision = [(p, master) for p, master in zip(trained, master_weights, strict=True) if p is not master]
        optimizer = torch.optim.AdamW(master_weights, lr=1e-3, fused=True)
        generator = np.random.default_rng(0)
        for _ in range(2):
            loss = _loss(model, generator, rows, length)
            loss.backward()
            for parameter, master in low_precision:
                if parameter.grad is not None:
                    master.grad = parameter.grad.float()
                    parameter.grad = None
            norm = float(nn.utils.clip_grad_norm_(master_weights, 1.0))
            assert np.isfinite(loss.item()) and np.isfinite(norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for parameter, master in low_precision:
                    parameter.copy_(master)

    return run


def _loss(model: PreTrainedModel, generator: np.random.Generator, rows: int, length: int) -> Tensor:
    if model.main_input_name == "pixel_values":
        images = torch.from_numpy(generator.integers(0, 255, (rows, 64, 64, 3), dtype=np.uint8))
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        logits = model(pixel_values=pixels.to(model.dtype)).logits
        return F.cross_entropy(logits.float(), torch.zeros(rows, dtype=torch.long))
    ids = torch.from_numpy(generator.integers(3, VOCABULARY, (rows, length)))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    logits = model(input_ids=ids, attention_mask=mask).logits.flatten(0, -2)
    return F.cross_entropy(logits.float(), torch.zeros(len(logits), dtype=torch.long))


@pytest.fixture(autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)
