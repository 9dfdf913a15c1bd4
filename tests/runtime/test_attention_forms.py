"""Attention of many families runs fused and equals the model's own code, in blocks of any kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.runtime.packed import fused_blocks
from deltaw.runtime.packing_checks import can_pack
from tests.runtime.recurrent_families import EXPERTS, FAMILIES, SIZES, recurrent_model
from tests.runtime.separate_rows import assert_equals_separate_rows, attach_everywhere

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GRANITE = {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0}
GEMMA4 = {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 120}
# Families whose blocks are fused entirely.
DENSE = {
    "olmo2": {},
    "olmo3": SLIDING,
    "exaone4": SLIDING,
    "ernie4_5": {},
    "glm": {},
    "glm4": {},
    "cohere": {},
    "cohere2": SLIDING,
    "hunyuan_v1_dense": {},
    "granite": GRANITE,
}
# Families with fused attention in blocks with experts, recurrent layers, or unknown MLPs.
OTHERS = {
    "apertus": {},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS | {"hidden_size": 64},
    "granitemoe": GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "afmoe": EXPERTS | SLIDING,
    "gemma4_text": SLIDING | GEMMA4,
    "gpt_oss": SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def model_of(family: str, settings: dict[str, object]) -> nn.Module:
    """Create a frozen model whose matrices are large enough that every part of attention has an effect."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **settings}), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.normal_(0.1 if name.endswith("bias") else 0.8, 0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", [*DENSE, *OTHERS])
def test_fused_attention_equals_separate_rows(family):
    model = attach_everywhere(model_of(family, {**DENSE, **OTHERS}[family]))
    assert can_pack(model).value
    fused = fused_blocks(model)
    assert fused.fuses_attention
    assert fused.choice.value == (family in DENSE), fused.choice.why
    assert_equals_separate_rows(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_of_hybrid_models_is_fused(family):
    assert fused_blocks(recurrent_model(family)).fuses_attention
