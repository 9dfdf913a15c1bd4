"""Families of GGUF files with recurrent layers, and Granite: tensor rules, hyperparameters and checks."""

from __future__ import annotations

import functools
import math

import torch
from gguf import ExpertGatingFuncType
from torch import Tensor
from transformers import PretrainedConfig

from deltaw.export.gguf_attention import Hyperparameters, expert_rules, expert_values, paired_rules, shifted_norm
from deltaw.export.gguf_checks import check_head_size, check_normalized_experts, head_size, key_heads, refuse_if
from deltaw.export.gguf_tensors import TensorRule, exchange_groups, split_rules


def _squeeze(weight: Tensor) -> Tensor:
    """Return the weight (channels, 1, width) of a depthwise convolution as (channels, width)."""
    return weight.squeeze(1)


def _decay(logarithm: Tensor) -> Tensor:
    """Return the decay -exp(A_log)."""
    return -logarithm.exp()


def _per_attention_layer(config: PretrainedConfig, value: int) -> list[int]:
    """Return one number per layer: ``value`` for layers with attention, 0 for recurrent layers."""
    return [value if kind == "full_attention" else 0 for kind in config.layer_types]


def mamba_rules(groups: int) -> list[TensorRule]:
    """Return the rules of a Mamba-2 layer whose norm has ``groups`` groups."""
    return [
        TensorRule(r"mamba\.A_log", "ssm_a", values=lambda logarithm: _decay(logarithm)[:, None]),
        TensorRule(r"mamba\.D", "ssm_d", values=lambda skip: skip[:, None]),
        TensorRule(r"mamba\.dt_bias", "ssm_dt.bias"),
        TensorRule(r"mamba\.conv1d\.weight", values=_squeeze),
        TensorRule(r"mamba\.norm\.weight", values=lambda weight: weight.unflatten(0, (groups, -1))),
    ]


def mamba_values(config: PretrainedConfig) -> Hyperparameters:
    return {
        "ssm_conv_kernel": config.mamba_d_conv,
        "ssm_state_size": config.mamba_d_state,
        "ssm_group_count": config.mamba_n_groups,
        "ssm_inner_size": config.mamba_n_heads * config.mamba_d_head,
        "ssm_time_step_rank": config.mamba_n_heads,
    }


def check_mamba(config: PretrainedConfig) -> None:
    limits = getattr(config, "time_step_limit", None)
    is_limited = limits is not None and (limits[0] > 0 or limits[1] < math.inf)
    refuse_if(is_limited, config, f"time_step_limit {limits} (it does not limit the time step)")


def granite_rules(config: PretrainedConfig) -> list[TensorRule]:
    """Return the rules of all Granite families. Gate and up projections share one weight."""
    part = "_shexp" if getattr(config, "num_local_experts", 0) else ""
    shared = (f"ffn_gate{part}.weight", f"ffn_up{part}.weight")
    return [
        *paired_rules(config),
        *split_rules(
            r"block_sparse_moe\.input_linear\.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), stacked=True
        ),
        *split_rules(r"shared_mlp\.input_linear\.weight", shared),
        TensorRule(r"shared_mlp\.output_linear\.weight", f"ffn_down{part}.weight"),
        *mamba_rules(getattr(config, "mamba_n_groups", 1)),
    ]


def granite_values(config: PretrainedConfig) -> Hyperparameters:
    values: Hyperparameters = {
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "attention_scale": config.attention_multiplier,
        "logit_scale": config.logits_scaling,
    }
    shared = getattr(config, "shared_intermediate_size", 0)
    if experts := getattr(config, "num_local_experts", 0):
        values |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        values |= {"expert_shared_feed_forward_length": shared or None}
    elif shared:
        values["feed_forward_length"] = shared
    if config.model_type == "granitemoehybrid":
        # In these models, llama.cpp uses this field to enable rotary embeddings.
        values["rope_scaling_finetuned"] = config.position_embedding_type == "rope"
        if "linear_attention" in config.layer_types:
            values |= {"head_count_kv": _per_attention_layer(config, key_heads(config)), **mamba_values(config)}
    return values


def check_granite(config: PretrainedConfig) -> None:
    for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier"):
        refuse_if(getattr(config, name) == 0, config, f"{name} 0 (it takes 0 for an absent value)")
    if config.model_type == "granitemoehybrid" and "linear_attention" in config.layer_types:
        check_mamba(config)
        _check_attention(config)
        is_other = config.mamba_n_heads * config.mamba_d_head != 2 * config.hidden_size
        refuse_if(is_other, config, "mamba_expand (it takes 2)")


def _check_attention(config: PretrainedConfig) -> None:
    """Check that a model with recurrent layers has attention too. llama.cpp creates the inputs of both."""
    refuse_if("full_attention" not in config.layer_types, config, "layers, none of which has attention")


def qwen35_rules(config: PretrainedConfig) -> list[TensorRule]:
    """Return the rules of Qwen3.5.

    In transformers, the value heads of a key head are adjacent. In llama.cpp, value head i uses key head i modulo the
    number of key heads. The value heads are reordered accordingly.
    """
    groups = config.linear_num_key_heads
    exchange = functools.partial(exchange_groups, groups=groups, members=config.linear_num_value_heads // groups)
    keys = 2 * groups * config.linear_key_head_dim

    def exchange_values(rows: Tensor) -> Tensor:
        """Reorder the value heads in rows of queries, keys and values."""
        return torch.cat([rows[:keys], exchange(rows[keys:])])

    return [
        shifted_norm(r"(?:input_layernorm|post_attention_layernorm|q_norm|k_norm|model\.norm)\.weight"),
        TensorRule(r"in_proj_qkv\.weight", rows=exchange_values),
        TensorRule(r"in_proj_[zab]\.weight", rows=exchange),
        TensorRule(r"linear_attn\.out_proj\.weight", columns=functools.partial(exchange, dim=-1)),
        TensorRule(r"linear_attn\.conv1d\.weight", values=lambda weight: exchange_values(_squeeze(weight))),
        TensorRule(r"A_log", "ssm_a", values=lambda logarithm: exchange(_decay(logarithm))),
        TensorRule(r"dt_bias", "ssm_dt.bias", values=exchange),
    ]


def _position_sections(config: PretrainedConfig) -> list[int]:
    """Return the number of rotary frequencies of each coordinate of an image. Text has three equal coordinates."""
    return list(config.rope_parameters.get("mrope_section", (11, 11, 10)))


def qwen35_values(config: PretrainedConfig) -> Hyperparameters:
    return {
        "ssm_conv_kernel": config.linear_conv_kernel_dim,
        "ssm_state_size": config.linear_key_head_dim,
        "ssm_group_count": config.linear_num_key_heads,
        "ssm_inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "ssm_time_step_rank": config.linear_num_value_heads,
        "full_attention_interval": config.layer_types.index("full_attention") + 1,
        "rope_dimension_sections": [*_position_sections(config), 0],
    }


def check_qwen35(config: PretrainedConfig) -> None:
    sizes = (config.linear_key_head_dim, config.linear_value_head_dim)
    refuse_if(sizes[0] != sizes[1], config, f"different sizes {sizes} of keys and values in recurrent layers")
    kinds = list(config.layer_types)
    interval = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    expected = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(kinds))]
    has_other_order = interval > len(kinds) or kinds != expected
    sections = _position_sections(config)
    frequencies = int(head_size(config) * config.rope_parameters.get("partial_rotary_factor", 1.0)) // 2
    # llama.cpp uses position 0 for a frequency that belongs to no section.
    is_covered = all(i < 3 * sections[i % 3] for i in range(min(frequencies, sum(sections))))
    refuse_if(not is_covered or sum(sections) > head_size(config), config, f"mrope_section {sections}")
    has_other_order = has_other_order or "linear_attention" not in kinds
    refuse_if(has_other_order, config, "order of recurrent and full-attention layers, unlike the published models")


def lfm2_rules(_: PretrainedConfig) -> list[TensorRule]:
    """Return the rules of LFM2, also with experts."""
    return [
        TensorRule(r"conv\.conv\.weight", values=_squeeze),
        TensorRule(r"expert_bias", "exp_probs_b.bias"),
        *expert_rules("w1", "w2", "w3"),
    ]


def lfm2_values(config: PretrainedConfig) -> Hyperparameters:
    """Return the hyperparameters of LFM2. Its layers are attention or short convolutions, which have 0 key heads."""
    inner = config.intermediate_size
    if getattr(config, "block_auto_adjust_ff_dim", False):
        inner = int(2 * inner / 3)
        inner = int(config.block_ffn_dim_multiplier * inner)
        inner = config.block_multiple_of * -(-inner // config.block_multiple_of)
    values: Hyperparameters = {
        "feed_forward_length": inner,
        "head_count_kv": _per_attention_layer(config, key_heads(config)),
        "shortconv_l_cache": config.conv_L_cache,
    }
    if config.model_type == "lfm2_moe":
        values |= expert_values(config, config.num_experts, config.num_experts_per_tok)
        values |= {
            "leading_dense_block_count": config.num_dense_layers,
            "expert_gating_func": ExpertGatingFuncType.SIGMOID,
            "expert_weights_scale": config.routed_scaling_factor,
        }
    return values


def check_lfm2(config: PretrainedConfig) -> None:
    check_head_size(config)
    _check_attention(config)
    refuse_if("conv" not in config.layer_types, config, "layers, none of which has a convolution")


def check_lfm2_moe(config: PretrainedConfig) -> None:
    check_lfm2(config)
    scale = config.routed_scaling_factor
    refuse_if(scale != 1, config, f"routed_scaling_factor {scale} (it takes 1)")
    check_normalized_experts(config)
    refuse_if(not config.use_expert_bias, config, "experts without a bias")


def qwen35_moe_rules(config: PretrainedConfig) -> list[TensorRule]:
    """Return the rules of Qwen3.5 with experts."""
    gate = TensorRule(r"shared_expert_gate\.weight", layout=lambda weight: weight.squeeze(0))
    return [*qwen35_rules(config), *expert_rules("gate_proj", "down_proj", "up_proj"), gate]


def qwen35_moe_values(config: PretrainedConfig) -> Hyperparameters:
    experts = expert_values(config, config.num_experts, config.num_experts_per_tok)
    shared = {"expert_shared_feed_forward_length": config.shared_expert_intermediate_size}
    return {**qwen35_values(config), **experts, **shared}


def falcon_rules(config: PretrainedConfig) -> list[TensorRule]:
    """Return the rules of Falcon-H1, whose multipliers are folded into the weights."""
    gate, down = config.mlp_multipliers
    inputs = config.attention_in_multiplier
    inner = config.mamba_n_heads * config.mamba_d_head
    states = config.mamba_n_groups * config.mamba_d_state
    sizes = torch.tensor([inner, inner, states, states, config.mamba_n_heads])
    row_factors = (torch.tensor(config.ssm_multipliers) * config.ssm_in_multiplier).repeat_interleave(sizes)
    factors = {
        r"feed_forward\.gate_proj": gate,
        r"feed_forward\.down_proj": down,
        r"self_attn\.[qv]_proj": inputs,
        r"self_attn\.k_proj": inputs * config.key_multiplier,
        r"self_attn\.o_proj": config.attention_out_multiplier,
        r"mamba\.out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    return [
        *(
            TensorRule(rf"{name}\.weight", rows=functools.partial(torch.mul, other=value))
            for name, value in factors.items()
        ),
        TensorRule(r"mamba\.in_proj\.weight", rows=lambda rows: rows * row_factors[:, None].to(rows.device)),
        TensorRule(r"pre_ff_layernorm\.weight", "ffn_norm"),
        *mamba_rules(config.mamba_n_groups),
    ]


def check_falcon(config: PretrainedConfig) -> None:
    check_mamba(config)
    is_gated_later = config.mamba_rms_norm and config.mamba_norm_before_gate
    refuse_if(is_gated_later, config, "mamba_norm_before_gate: true (it multiplies by the gate before the norm)")
    differs = config.tie_word_embeddings and config.lm_head_multiplier != config.embedding_multiplier
    refuse_if(differs, config, "tied embedding with two multipliers")
