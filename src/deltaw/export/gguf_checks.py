"""Checks that reject configurations that llama.cpp would compute differently.

llama.cpp selects its computation by the name of the architecture. It silently ignores settings that it does not know.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from deltaw.errors import UserError


def refuse_if(is_unsupported: object, config: PretrainedConfig, feature: str) -> None:
    """Reject the model with a UserError if ``is_unsupported``. ``feature`` names what llama.cpp does not support."""
    if is_unsupported:
        hint = "serve it with deltaw serve, or merge it (deltaw merge) for another program"
        message = f"llama.cpp does not support this {config.model_type} model's {feature}"
        raise UserError(message, location="model", hint=hint)


def head_size(config: PretrainedConfig) -> int:
    """Return the dimension of an attention head. If layers differ, return that of the full-attention layers."""
    config = _full_layer(config)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _full_layer(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a layer without a sliding window."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    layer: PretrainedConfig = config.per_layer_config[windows(config).index(False)]
    return layer


def check_head_size(config: PretrainedConfig) -> None:
    """Check the head size of a family for which llama.cpp does not read it."""
    is_other = head_size(config) * config.num_attention_heads != config.hidden_size
    refuse_if(is_other, config, "head_dim (it takes hidden_size / num_attention_heads)")


def key_heads(config: PretrainedConfig) -> int:
    """Return the number of key and value heads. If layers differ, return that of the full-attention layers."""
    config = _full_layer(config)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def windows(config: PretrainedConfig) -> list[bool]:
    """Return one value per layer: True if it has a sliding window."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def check_windows(config: PretrainedConfig, expected: Sequence[bool]) -> None:
    """Check that the same layers as in the published models have a sliding window."""
    differs = windows(config) != list(expected)
    refuse_if(differs, config, "order of sliding-window and full-attention layers, unlike the published models")


def check_normalized_experts(config: PretrainedConfig) -> None:
    """Check that the weights of the selected experts are divided by their sum, as llama.cpp does."""
    refuse_if(not config.norm_topk_prob, config, "norm_topk_prob: false (it normalizes the experts' weights)")
