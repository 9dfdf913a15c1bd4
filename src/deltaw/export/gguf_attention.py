"""Families of GGUF files with attention in all layers: tensor rules, hyperparameters and checks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from deltaw.export.gguf_checks import (
    check_head_size,
    check_normalized_experts,
    check_windows,
    head_size,
    key_heads,
    refuse_if,
    windows,
)
from deltaw.export.gguf_tensors import TensorRule, adjacent_pairs, split_rules

Hyperparameters = dict[str, Any]
"""Values by the names of the methods of GGUFWriter, without ``add_``. None if the file lacks the value."""


def paired_rules(config: PretrainedConfig) -> list[TensorRule]:
    """Order the rows of query and key projections for rotary embeddings of adjacent pairs."""
    heads = {"q_proj": int(config.num_attention_heads), "k_proj": key_heads(config)}
    return [
        TensorRule(rf"{name}\.(?:weight|bias)", rows=functools.partial(adjacent_pairs, heads=count))
        for name, count in heads.items()
    ]


def shifted_norm(pattern: str) -> TensorRule:
    """Return the rule of norms that multiply by 1 + w in transformers and by w in llama.cpp."""
    return TensorRule(pattern, values=lambda weight: weight + 1)


def gemma_rules(_: PretrainedConfig) -> list[TensorRule]:
    return [shifted_norm(r"\w*norm\.weight")]


def gpt2_rules(_: PretrainedConfig) -> list[TensorRule]:
    """Transpose weights of Conv1D."""
    return [TensorRule(r"(?:c_attn|c_proj|c_fc)\.weight", layout=torch.t)]


def gpt2_values(config: PretrainedConfig) -> Hyperparameters:
    without = dict.fromkeys(("head_count_kv", "layer_norm_rms_eps", "key_length", "value_length"))
    inner = config.n_inner or 4 * config.hidden_size
    return {**without, "feed_forward_length": inner, "layer_norm_eps": config.layer_norm_epsilon}


def check_gpt2(config: PretrainedConfig) -> None:
    is_scaled = config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
    refuse_if(is_scaled, config, "custom scaling of attention scores")
    refuse_if(config.add_cross_attention, config, "cross-attention")


def gemma_values(config: PretrainedConfig) -> Hyperparameters:
    return {
        "sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": final_cap(config),
    }


def final_cap(config: PretrainedConfig) -> float:
    """Return the limit of the logits. 0 disables it in llama.cpp, whose default is 30."""
    return config.final_logit_softcapping or 0.0


def check_gemma2(config: PretrainedConfig) -> None:
    is_uncapped = not config.attn_logit_softcapping or not config.final_logit_softcapping
    refuse_if(is_uncapped, config, "scores or logits without a limit (softcapping)")
    _check_score_scale(config, large=46)
    check_windows(config, [i % 2 == 0 for i in range(config.num_hidden_layers)])


def check_gemma3(config: PretrainedConfig) -> None:
    _check_score_scale(config, large=62)
    check_windows(config, [(i + 1) % 6 != 0 for i in range(config.num_hidden_layers)])
    refuse_if(getattr(config, "use_bidirectional_attention", False), config, "attention to later tokens")
    refuse_if(config.attn_logit_softcapping, config, "limit of the attention scores (attn_logit_softcapping)")


def _check_score_scale(config: PretrainedConfig, *, large: int) -> None:
    """Check the score scale: llama.cpp uses the head size, and width / heads for the model with ``large`` layers."""
    by_width = config.hidden_size / config.num_attention_heads
    expected = by_width if config.num_hidden_layers == large else config.head_dim
    scalar = config.query_pre_attn_scalar
    refuse_if(scalar != expected, config, f"query_pre_attn_scalar {scalar} (it takes {expected:g})")


def gemma4_rules(_: PretrainedConfig) -> list[TensorRule]:
    return [
        TensorRule(r"layer_scalar", "layer_output_scale.weight"),
        TensorRule(r"experts\.gate_up_proj", "ffn_gate_up_exps.weight"),
        TensorRule(r"experts\.down_proj", "ffn_down_exps.weight"),
        TensorRule(r"router\.scale", "ffn_gate_inp.scale"),
        TensorRule(r"router\.per_expert_scale", "ffn_down_exps.scale"),
        TensorRule(r"per_layer_model_projection\.weight", adaptable=False),
        TensorRule(r"embed_tokens_per_layer\.weight", adaptable=False),
    ]


def gemma4_values(config: PretrainedConfig) -> Hyperparameters:
    layers = config.num_hidden_layers
    shared = config.num_kv_shared_layers
    inner = config.intermediate_size
    wide = 2 if config.use_double_wide_mlp else 1
    full = head_size(config)
    local = next((config.per_layer_config[i].head_dim for i in range(layers) if windows(config)[i]), full)
    values: Hyperparameters = {
        "feed_forward_length": [inner * (wide if i >= layers - shared else 1) for i in range(layers)],
        "head_count_kv": [config.per_layer_config[i].num_key_value_heads for i in range(layers)],
        "key_length_swa": local,
        "value_length_swa": local,
        "sliding_window": config.sliding_window,
        "sliding_window_pattern": windows(config),
        "shared_kv_layers": shared,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "final_logit_softcapping": final_cap(config),
        # The part of a head that is not rotated has divisors of 1e30, see gemma4_divisors.
        "rope_dimension_count": full,
        "rope_dimension_count_swa": local,
    }
    if config.enable_moe_block:
        values |= expert_values(config, config.num_experts, config.top_k_experts)
    return values


def gemma4_divisors(config: PretrainedConfig) -> np.ndarray:
    """Return the (size / 2) divisors of the rotary frequencies of Gemma 4's full attention.

    A part of each head is rotated by the frequencies of the whole head. An infinite divisor stops the rest.
    """
    count = head_size(config) // 2
    share = config.rope_parameters["full_attention"].get("partial_rotary_factor", 1.0)
    return np.where(np.arange(count) < int(share * 2 * count // 2), 1.0, 1e30).astype(np.float32)


def check_gemma4(config: PretrainedConfig) -> None:
    refuse_if(config.use_bidirectional_attention == "all", config, "attention to later tokens")
    own_vocabulary = config.hidden_size_per_layer_input and config.vocab_size_per_layer_input != config.vocab_size
    refuse_if(own_vocabulary, config, "vocabulary of the embeddings per layer")
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    # Layers that share keys read those of the last two other layers.
    differs = first_shared < config.num_hidden_layers and windows(config)[:first_shared][-2:] != [True, False]
    refuse_if(differs, config, "order of layers that share keys and values, unlike the published models")
    rope = config.rope_parameters["full_attention"]
    kind = rope.get("rope_type", "default")
    is_plain = kind == "proportional" and rope.get("factor", 1.0) == 1.0
    refuse_if(not is_plain, config, f"rotary embeddings of type '{kind}' with these settings")


def check_smollm3(config: PretrainedConfig) -> None:
    layers = list(config.no_rope_layers)
    feature = f"layers without rotary embeddings ({layers}); it takes every fourth"
    refuse_if(layers != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)], config, feature)
    check_qwen(config)


def check_qwen(config: PretrainedConfig) -> None:
    layer_types = getattr(config, "layer_types", None) or []
    windowed = getattr(config, "use_sliding_window", False) and "sliding_attention" in layer_types
    refuse_if(windowed, config, "sliding windows in some layers")


def check_qwen2(config: PretrainedConfig) -> None:
    check_head_size(config)
    check_qwen(config)


def check_qwen3_moe(config: PretrainedConfig) -> None:
    refuse_if(getattr(config, "use_sliding_window", False), config, "sliding windows")
    is_partial = config.mlp_only_layers or config.decoder_sparse_step != 1
    refuse_if(is_partial, config, "layers without experts")
    check_normalized_experts(config)


def expert_rules(gate: str, down: str, up: str) -> list[TensorRule]:
    """Stack the experts, which the model's files store one by one, or split their stacks.

    Args:
        gate, down, up: Names of the projections of an expert.
    """
    names = (gate, down, up)
    stored = ("ffn_gate_exps.weight", "ffn_down_exps.weight", "ffn_up_exps.weight")
    single = [
        TensorRule(rf"experts\.(?P<expert>\d+)\.{name}\.weight", target)
        for name, target in zip(names, stored, strict=True)
    ]
    split = split_rules(r"experts\.gate_up_proj", (stored[0], stored[2]), stacked=True)
    return [*single, *split, TensorRule(r"experts\.down_proj", stored[1])]


def qwen3_moe_rules(_: PretrainedConfig) -> list[TensorRule]:
    return expert_rules("gate_proj", "down_proj", "up_proj")


def qwen3_moe_values(config: PretrainedConfig) -> Hyperparameters:
    return expert_values(config, config.num_experts, config.num_experts_per_tok)


def expert_values(config: PretrainedConfig, count: int, used: int) -> Hyperparameters:
    return {
        "expert_count": count,
        "expert_used_count": used,
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
    }


def olmo3_values(config: PretrainedConfig) -> Hyperparameters:
    return {"sliding_window": config.sliding_window, "sliding_window_pattern": windows(config)}


def check_olmo3(config: PretrainedConfig) -> None:
    check_head_size(config)
    check_windows(config, [(i + 1) % 4 != 0 for i in range(config.num_hidden_layers)])


def check_exaone4(config: PretrainedConfig) -> None:
    """Check the windows: llama.cpp computes three of four layers with windows for the model with 64 layers only."""
    layers = config.num_hidden_layers
    check_windows(config, [layers == 64 and (i + 1) % 4 != 0 for i in range(layers)])
    # Without windows, all layers have rotary embeddings in llama.cpp, and none in the model if it has a window size.
    refuse_if(layers != 64 and config.sliding_window is not None, config, "sliding_window without layers that use it")


def hunyuan_values(config: PretrainedConfig) -> Hyperparameters:
    """Return the base of the rotary embeddings, which a fixed alpha stretches."""
    rope = config.rope_parameters
    size = head_size(config)
    stretch = rope["alpha"] ** (size / (size - 2)) if rope["rope_type"] == "dynamic" else 1.0
    return {"rope_freq_base": rope["rope_theta"] * stretch}


def check_hunyuan(config: PretrainedConfig) -> None:
    is_dynamic = config.rope_parameters["rope_type"] == "dynamic" and not config.rope_parameters.get("alpha")
    refuse_if(is_dynamic, config, "rotary embeddings that depend on the length of the text")
