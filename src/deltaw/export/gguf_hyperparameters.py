"""A model's sizes, norms, positions and windows as GGUF metadata, from its configuration.

Knows configurations of transformers and the writer of the ``gguf`` package; no tensors and no tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from transformers import PretrainedConfig

from deltaw.errors import UserError
from deltaw.export.gguf_architectures import Architecture

Rope = Mapping[str, Any]


def add_hyperparameters(out: GGUFWriter, architecture: Architecture, config: PretrainedConfig) -> list[str]:
    """Write the metadata that llama.cpp builds the model from.

    Returns:
        Lines about what the file's reader computes otherwise, for a person.

    Raises:
        UserError: the model's rotary positions are scaled in a way that llama.cpp does not know.
    """
    notes = []
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if architecture.window_ignored and window and window < context:
        notes.append(
            f"note: llama.cpp ignores this model's sliding window, so its context is set to {window} tokens"
        )
        context = int(window)
    heads = int(config.num_attention_heads)
    out.add_context_length(context)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_head_count(heads)
    out.add_vocab_size(config.vocab_size)
    if architecture.arch == MODEL_ARCH.GPT2:
        out.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        out.add_layer_norm_eps(config.layer_norm_epsilon)
        return notes
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count_kv(int(getattr(config, "num_key_value_heads", None) or heads))
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    out.add_key_length(size)
    out.add_value_length(size)
    _add_positions(out, architecture, config, size)
    if architecture.arch == MODEL_ARCH.PHI3:
        out.add_sliding_window(0)  # which llama.cpp takes for a model without windows
    elif architecture.arch in (MODEL_ARCH.GEMMA2, MODEL_ARCH.GEMMA3):
        out.add_sliding_window(config.sliding_window)
        for add, cap in (
            (out.add_attn_logit_softcapping, config.attn_logit_softcapping),
            (out.add_final_logit_softcapping, config.final_logit_softcapping),
        ):
            if cap is not None:
                add(cap)
    return notes


def rope_tensors(config: PretrainedConfig) -> dict[str, np.ndarray]:
    """Divisors of the rotary frequencies that are stored as tensors: Llama 3's, and Phi-3's long contexts."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        return {"rope_freqs.weight": llama3_divisors(rope, size)}
    if kind == "longrope":
        return {
            f"rope_factors_{name}.weight": np.asarray(rope[f"{name}_factor"], np.float32)
            for name in ("long", "short")
        }
    return {}


def llama3_divisors(rope: Rope, size: int) -> np.ndarray:
    """By what Llama 3 divides each of a head's size / 2 frequencies.

    Wavelengths above ``context / low_freq_factor`` are stretched by ``factor``, those below
    ``context / high_freq_factor`` not at all; in between, the two frequencies are mixed linearly in
    ``context / wavelength``.
    """
    frequencies = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 / ((1 - share) / rope["factor"] + share)).astype(np.float32)


def _add_positions(
    out: GGUFWriter, architecture: Architecture, config: PretrainedConfig, head_size: int
) -> None:
    rope = _rope(config)
    turned = int(head_size * rope.get("partial_rotary_factor", 1.0))
    out.add_rope_dimension_count(turned)
    out.add_rope_freq_base(float(rope["rope_theta"]))
    nested = config.rope_parameters
    if "sliding_attention" in nested:
        local = nested["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise _unknown(f"{local['rope_type']} in windowed layers")
        out.add_rope_freq_base_swa(float(local["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        out.add_rope_scaling_type(RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn(out, rope)
    elif kind == "longrope" and architecture.arch == MODEL_ARCH.PHI3:
        out.add_rope_scaling_attn_factors(_long_attention(rope, config))
    elif kind not in ("default", "llama3") or (kind == "llama3" and architecture.arch != MODEL_ARCH.LLAMA):
        raise _unknown(kind)
    if architecture.arch == MODEL_ARCH.PHI3:
        out.add_rope_scaling_orig_ctx_len(
            int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        )


def _add_yarn(out: GGUFWriter, rope: Rope) -> None:
    out.add_rope_scaling_type(RopeScalingType.YARN)
    out.add_rope_scaling_factor(rope["factor"])
    out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    for key, add in (
        ("attention_factor", out.add_rope_scaling_yarn_attn_factor),
        ("beta_fast", out.add_rope_scaling_yarn_beta_fast),
        ("beta_slow", out.add_rope_scaling_yarn_beta_slow),
    ):
        if rope.get(key) is not None:
            add(rope[key])


def _long_attention(rope: Rope, config: PretrainedConfig) -> float:
    """The factor of attention scores' sine and cosine in LongRoPE: √(1 + ln s / ln original context)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope["original_max_position_embeddings"]
    stretch = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def _rope(config: PretrainedConfig) -> Rope:
    """The rotary settings of the layers that attend to everything."""
    nested: Rope = getattr(config, "rope_parameters", None) or {}
    found: Rope = nested.get("full_attention", nested)
    return found


def _unknown(kind: str) -> UserError:
    return UserError(
        f"rotary positions of kind '{kind}' are not exported to GGUF here",
        where="model: rope_parameters",
        hint="merge the adapter (deltaw merge) and use llama.cpp's own convert_hf_to_gguf.py",
    )
