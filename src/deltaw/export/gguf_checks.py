"""Checks of configurations that llama.cpp does not compute as the model does.

llama.cpp selects its computation by the name of the architecture and silently ignores other settings.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from deltaw.errors import UserError


def refuse_if(is_unsupported: object, config: PretrainedConfig, feature: str) -> None:
    """Raise a UserError about a feature of a model if llama.cpp does not support it."""
    if is_unsupported:
        hint = "serve it with deltaw serve, or merge it (deltaw merge) for another program"
        message = f"llama.cpp does not support this {config.model_type} model's {feature}"
        raise UserError(message, location="model", hint=hint)


def head_size(config: PretrainedConfig) -> int:
    """Return the dimension of an attention head, or of one of full attention if layers differ."""
    config = _full_layer(config)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _full_layer(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a layer without a sliding window."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    layer: PretrainedConfig = config.per_layer_config[windows(config).index(False)]
    return layer


def key_heads(config: PretrainedConfig) -> int:
    """Return the number of key and value heads, or of those of full attention if layers differ."""
    config = _full_layer(config)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def windows(config: PretrainedConfig) -> list[bool]:
    """Return True for each layer with a sliding window."""
    return [kind == "sliding_attention" for kind in config.layer_types]


def check_windows(config: PretrainedConfig, expected: Sequence[bool]) -> None:
    differs = windows(config) != list(expected)
    refuse_if(differs, config, "order of sliding-window and full-attention layers, unlike the published models")


def check_normalized_experts(config: PretrainedConfig) -> None:
    """Check that the weights of the selected experts are divided by their sum, as llama.cpp does."""
    refuse_if(not config.norm_topk_prob, config, "norm_topk_prob: false (it normalizes the experts' weights)")
