"""Tiny random models with recurrent layers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {"vocab_size": 120, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4}
DELTA |= {"layer_types": ["linear_attention", "full_attention"] * 2}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 2}
MAMBA |= {"mamba_chunk_size": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
EXPERTS |= {"shared_expert_intermediate_size": 32}
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
GRANITE = {"num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"] * 2}
NEMOTRON = {"mamba_num_heads": 6, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8}
NEMOTRON |= {"layers_block_type": ["mamba", "attention", "mlp", "mamba"]}
FAMILIES = {
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA | EXPERTS,
    "olmo_hybrid": DELTA,
    "lfm2": CONVOLUTION,
    "lfm3": CONVOLUTION,
    "lfm2_moe": CONVOLUTION | EXPERTS | {"num_dense_layers": 1},
    "granitemoehybrid": MAMBA | GRANITE,
    "granitemoehybrid, one group": MAMBA | GRANITE | {"mamba_n_groups": 1},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 96, "key_multiplier": 0.5},
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "nemotron_h": NEMOTRON,
}


def recurrent_model(
    family: str, dtype: torch.dtype = torch.float32, *, std: float = 0.15, **changes: object
) -> nn.Module:
    """Create a frozen, deterministic causal model. Matrices are large enough that the states have an effect.

    Args:
        family: Key of :data:`FAMILIES`.
        std: Standard deviation of the matrices.
        changes: Other values of the configuration.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.partition(",")[0], **{**SIZES, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, std)
    return model.to(dtype).eval().requires_grad_(False)
