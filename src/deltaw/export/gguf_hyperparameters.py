"""Hyperparameters of a model in a GGUF file, including those of its rotary embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from deltaw.errors import UserError
from deltaw.export.gguf_architectures import CONVERTER_HINT, Architecture
from deltaw.export.gguf_attention import Hyperparameters, gemma4_divisors
from deltaw.export.gguf_checks import head_size, key_heads, refuse_if
from deltaw.hub.gguf_settings import llama3_divisors

Rope = Mapping[str, Any]


def add_hyperparameters(out: GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> list[str]:
    """Write the hyperparameters of the model.

    Returns:
        Notes for the user about differences in llama.cpp.

    Raises:
        UserError: if llama.cpp does not support the scaling of the rotary embeddings.
    """
    notes = []
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if architecture.window_ignored and window and window < context:
        notes.append(f"note: llama.cpp ignores the model's sliding window; the context is limited to {window} tokens")
        context = int(window)
    size = head_size(config)
    values: Hyperparameters = {
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "head_count_kv": key_heads(config),
        "layer_norm_rms_eps": getattr(config, "rms_norm_eps", getattr(config, "norm_eps", None)),
        "key_length": size,
        "value_length": size,
    }
    if architecture.arch != MODEL_ARCH.GPT2:
        values |= _rotary_values(architecture, config, size)
    values |= architecture.values(config)
    for name, value in values.items():
        if value is not None:
            getattr(out, f"add_{name}")(value)
    return notes


def rope_tensors(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Return divisors of the rotary frequencies, stored as tensors for Llama 3, long contexts of Phi-3, and Gemma 4."""
    rope = _full_attention_rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_divisors(dict(rope), head_size(config) // 2)}
    if kind == "longrope":
        factors = {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    if kind == "proportional":
        return {"rope_freqs.weight": gemma4_divisors(config)}
    return {}


def _rotary_values(architecture: Architecture, config: PretrainedConfig, size: int) -> Hyperparameters:
    """Return the hyperparameters of the rotary embeddings.

    Args:
        size: Dimension of an attention head.
    """
    rope = _full_attention_rope(config)
    rotated = rope.get("partial_rotary_factor") or 1.0
    refuse_if(rotated != 1 and not architecture.partial_rotary, config, f"partial_rotary_factor {rotated}")
    values: Hyperparameters = {"rope_dimension_count": int(size * rotated), "rope_freq_base": float(rope["rope_theta"])}
    if (local := config.rope_parameters.get("sliding_attention")) is not None:
        if local.get("rope_type", "default") != "default":
            raise _unsupported_rope(f"{local['rope_type']} in windowed layers")
        values["rope_freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in architecture.rope_types:
        raise _unsupported_rope(kind)
    if kind in ("linear", "yarn"):
        values |= {"rope_scaling_type": RopeScalingType(kind), "rope_scaling_factor": rope["factor"]}
    if kind == "yarn":
        if not rope.get("truncate", True):
            raise _unsupported_rope("yarn without truncation")
        layer_type = "full_attention" if "full_attention" in config.rope_parameters else None
        _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"), layer_type=layer_type)
        values |= {
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
            # llama.cpp multiplies this value by 0.1·ln(factor) + 1.
            "rope_scaling_attn_factors": attention / (0.1 * math.log(rope["factor"]) + 1),
            "rope_scaling_yarn_beta_fast": rope.get("beta_fast"),
            "rope_scaling_yarn_beta_slow": rope.get("beta_slow"),
        }
    elif kind == "longrope":
        values["rope_scaling_attn_factors"] = _long_attention(rope, config)
    if architecture.arch == MODEL_ARCH.PHI3:
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["rope_scaling_orig_ctx_len"] = int(original)
    return values


def _long_attention(rope: Rope, config: PretrainedConfig) -> float:
    """Return LongRoPE's factor of sine and cosine: √(1 + ln(context / original) / ln original)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _full_attention_rope(config: PretrainedConfig) -> Rope:
    """Return the rotary settings of full-attention layers."""
    nested: Rope = getattr(config, "rope_parameters", None) or {}
    settings: Rope = nested.get("full_attention", nested)
    return settings


def _unsupported_rope(kind: str) -> UserError:
    message = f"deltaw does not export rotary embeddings of type '{kind}' to GGUF"
    return UserError(message, location="model: rope_parameters", hint=CONVERTER_HINT)
