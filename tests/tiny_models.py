"""Tiny random models of all families used in tests: two blocks of width 32, created from a configuration."""

from __future__ import annotations

import logging

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97
WINDOW = 6

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _gemma3() -> transformers.PretrainedConfig:
    layer_types = ["sliding_attention", "full_attention"]
    return transformers.Gemma3TextConfig(**_SHAPE, **_IDS, head_dim=8, sliding_window=WINDOW, layer_types=layer_types)


CAUSAL = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE, **_IDS),
    # transformers 5.20 would select an attention without score capping.
    "gemma2": lambda: transformers.Gemma2Config(
        **_SHAPE, **_IDS, head_dim=8, sliding_window=WINDOW, attn_implementation="eager"
    ),
    "gemma3": _gemma3,
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, **_IDS, head_dim=8),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "neox": lambda: transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **_IDS
    ),
    "phi": lambda: transformers.PhiConfig(**_SHAPE, **_IDS),
    "phi3": lambda: transformers.Phi3Config(**_SHAPE, **_IDS),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, **_IDS, sliding_window=WINDOW),
    "mixtral": lambda: transformers.MixtralConfig(**_SHAPE, **_IDS, num_local_experts=4),
    "cohere": lambda: transformers.CohereConfig(**_SHAPE, **_IDS, logit_scale=0.25),
}
# Models that do not use transformers' attention interface and therefore run padded rows.
PADDED = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **_IDS),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, **_IDS
    ),
}


def causal_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a tiny causal language model in eval mode and fp32, deterministic for a seed."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config({**CAUSAL, **PADDED}[family]()).eval()
    with torch.no_grad():
        # Default initial weights give attention almost no effect, so they are scaled up.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(3.0)
    return model
