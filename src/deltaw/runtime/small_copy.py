"""A small fp32 copy of a model: the same classes and settings, few and narrow blocks, random weights.

What a model's code computes does not depend on its size, nor on its weights. So questions about the code are
answered on such a copy: in fp32, where a difference is a difference, in a few milliseconds and megabytes,
and alike in a dry run on fake tensors. The size of a head stays, as rotary positions hang on it; so do the
ratios that tell layouts apart (several queries to a key, several keys).

Knows transformers' configurations; not what is asked of the copy.
"""

from __future__ import annotations

import copy
import math

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.initialization import no_init_weights

from deltaw.hub.quiet import quiet
from deltaw.hub.transformers_private import made_from_config
from deltaw.runtime.roles import real_tensors

VOCABULARY = 97
HIDDEN = 64
INNER = 96
# Below this many tokens a window hides something from the sample.
WINDOW = 8
# More distinct layers than this are not copied.
MOST_LAYERS = 16
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "moe_intermediate_size")


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A small copy of a backbone, in evaluation mode and frozen, with real fp32 values on the processor.

    Torch's random state is left as it is. Whatever foreign code raises for a small configuration is raised.
    """
    config = small_config(model.config)
    with real_tensors(), quiet(), torch.random.fork_rng(devices=[]):
        with no_init_weights():
            made = made_from_config(type(model), config, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in made.named_parameters():
            _fill(name, parameter.data, generator)
        made.tie_weights()
    return made.requires_grad_(False).eval()


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a small copy."""
    small = copy.deepcopy(config)
    heads, keys, size = _heads(config)
    few_keys = min(keys, 2)
    few_heads = few_keys * min(heads // keys, 2) if keys > 1 else 2
    apart = getattr(config, "head_dim", None) == size and hasattr(config, "num_key_value_heads")
    _set(small, "num_attention_heads", few_heads)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(small, name, few_keys if getattr(config, name) == keys else few_heads)
    _set(small, "hidden_size", HIDDEN if apart else few_heads * size)
    for name in _INNER:
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, INNER)
    if getattr(config, "vocab_size", None) is not None:
        small.vocab_size = VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = WINDOW
    _few_layers(small, config)
    patch = getattr(config, "patch_size", None)
    if isinstance(getattr(config, "image_size", None), int) and isinstance(patch, int):
        small.image_size = 2 * patch
    return small


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key heads and the size of one."""
    heads = int(config.num_attention_heads)
    keys = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if not isinstance(keys, int) or keys < 1 or heads % keys:
        raise ValueError("heads are not a multiple of key heads")
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return heads, keys, int(size)


def _few_layers(small: PretrainedConfig, config: PretrainedConfig) -> None:
    """As many layers as show every kind that the lists in the configuration tell apart, two at least."""
    count = int(config.num_hidden_layers)
    lists = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == count and count > 1
    }
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    last = max((kinds.index(kind) for kind in set(kinds)), default=0)
    few = min(count, max(2, last + 1))
    if few > MOST_LAYERS:
        raise ValueError("its kinds of layers show only far up")
    _set(small, "num_hidden_layers", few)
    for name, value in lists.items():
        setattr(small, name, list(value)[:few])


def _set(config: PretrainedConfig, name: str, value: int) -> None:
    """Set a number by the name that all configurations know it by (``attribute_map``)."""
    if getattr(config, name, None) is None:
        raise ValueError(f"the configuration has no {name}")
    setattr(config, name, value)


def _fill(name: str, values: torch.Tensor, generator: torch.Generator) -> None:
    """Random values at which every part of a block counts: weights of unit gain, biases and norms that differ
    from 0 and 1."""
    noise = torch.randn(values.shape, generator=generator)
    if values.dim() > 1:
        fan_in = values[0].numel() if "embed" not in name else 1
        values.copy_(noise / math.sqrt(fan_in))
    elif name.endswith("bias"):
        values.copy_(0.2 * noise)
    else:
        values.copy_(1 + 0.2 * noise)
