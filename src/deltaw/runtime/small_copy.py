"""Small fp32 copy of a model, on which properties of the model's code are tested.

The copy has the same classes and settings, with a small number of narrow blocks and random weights. The function that
a model's code computes does not depend on its sizes and weights, so a test on the copy is exact in fp32, takes
milliseconds, and works in a dry run on fake tensors. The copy preserves the head size, which affects rotary positions,
and the structure of grouped heads, which distinguishes layouts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.initialization import no_init_weights

from deltaw.hub.transformers_private import build_from_config, quiet
from deltaw.kernels import loader
from deltaw.kernels.torch_private import without_dispatch

Result = TypeVar("Result")

VOCABULARY = 97
HIDDEN = 64
INNER = 96
# Sliding window of the copy, smaller than the sample.
WINDOW = 8
# Maximum number of layers of the copy.
MAX_LAYERS = 16
# Endings of the names of settings that list numbers of layers.
_INDEX_LISTS = ("_idxs", "_indices")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim", "moe_intermediate_size")


def small_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a small, frozen copy of a backbone in evaluation mode, with fp32 values on the CPU.

    Torch's random state is preserved. Errors of third-party code for the small configuration propagate.
    """
    config = small_config(model.config)
    with without_dispatch(), quiet(), torch.random.fork_rng(devices=[]):
        with no_init_weights():
            copied = build_from_config(type(model), config, torch.float32)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in copied.named_parameters():
            _fill(name, parameter.data, generator)
        copied.tie_weights()
    return copied.requires_grad_(False).eval()


def measure_once(
    cache: dict[Any, Result], model: PreTrainedModel, measure: Callable[[PreTrainedModel], Result], variant: str = ""
) -> Result:
    """Return the result of ``measure`` on a small copy of a backbone, cached in ``cache``.

    The key contains all dependencies: class, configuration, kernels, arithmetic, and ``variant``.
    """
    arithmetic = loader.library() is not None, loader.arithmetic().with_approximations(())
    key = (type(model), model.config.to_json_string(use_diff=False), variant, *arithmetic)
    if key not in cache:
        with without_dispatch():
            cache[key] = measure(small_copy(model))
    return cache[key]


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a small copy."""
    config = copy.deepcopy(config)
    overrides = _take_layer_overrides(config)
    small = copy.deepcopy(config)
    heads, keys, size = _heads(config)
    num_keys = min(keys, 2)
    num_heads = num_keys * min(heads // keys, 2) if keys > 1 else 2
    has_head_size = getattr(config, "head_dim", None) == size and hasattr(config, "num_key_value_heads")
    _set(small, "num_attention_heads", num_heads)
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            setattr(small, name, num_keys if getattr(config, name) == keys else num_heads)
    _set(small, "hidden_size", HIDDEN if has_head_size else num_heads * size)
    if _heads(small)[2] != size:  # a property that divides the hidden size (Falcon)
        _set(small, "hidden_size", num_heads * size)
    for name in _INNER:
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, INNER)
    _reduce_mamba_heads(small)
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if getattr(config, name, None) is not None:
            setattr(small, name, VOCABULARY)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(small, name, 0)
    if getattr(config, "sliding_window", None) is not None:
        small.sliding_window = WINDOW
    _reduce_layers(small, config)
    if overrides:
        limits = {"num_key_value_heads": num_keys, **dict.fromkeys(_INNER, INNER)}
        kept = {n: values for n, values in overrides.items() if n < int(small.num_hidden_layers)}
        reduced: dict[int | str, dict[str, Any]] = {
            n: {k: min(v, limits.get(k, v)) for k, v in values.items()} for n, values in kept.items()
        }
        small.per_layer_config = reduced
    patch = getattr(config, "patch_size", None)
    if isinstance(getattr(config, "image_size", None), int) and isinstance(patch, int):
        small.image_size = 2 * patch
    return small


def _take_layer_overrides(config: PretrainedConfig) -> dict[int, dict[str, int]]:
    """Return the sizes of layers that differ from the others (Gemma 4), by layer, and remove them from ``config``."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    settings = config.to_dict()["per_layer_config"]
    overrides = {int(layer): values for layer, values in settings.items()}
    if any(not isinstance(value, int) for values in overrides.values() for value in values.values()):
        raise ValueError("the settings of single layers cannot be reduced")
    config.per_layer_config = None
    return overrides


def _reduce_mamba_heads(small: PretrainedConfig) -> None:
    """Set the head size of Mamba layers whose inner size is a multiple of the hidden size."""
    expansion = getattr(small, "mamba_expand", None)
    heads = getattr(small, "mamba_n_heads", None)
    if not isinstance(expansion, int) or not isinstance(heads, int) or getattr(small, "mamba_d_ssm", None) is not None:
        return
    inner = expansion * int(small.hidden_size)
    num_heads = math.gcd(heads, inner)
    if num_heads % int(getattr(small, "mamba_n_groups", 1)):
        raise ValueError("the Mamba heads cannot be reduced")
    small.mamba_n_heads = num_heads
    small.mamba_d_head = inner // num_heads


def _heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return the numbers of query heads and key heads, and the head size."""
    heads = int(config.num_attention_heads)
    keys = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    if not isinstance(keys, int) or keys < 1 or heads % keys:
        raise ValueError("heads are not a multiple of key heads")
    return heads, keys, int(getattr(config, "head_dim", None) or int(config.hidden_size) // heads)


def _reduce_layers(small: PretrainedConfig, config: PretrainedConfig) -> None:
    """Set a number of layers that includes every kind of layer listed in the configuration, at least two."""
    count = int(config.num_hidden_layers)
    sequences = {name: value for name, value in config.to_dict().items() if isinstance(value, (list, tuple))}
    by_layer = {name: value for name, value in sequences.items() if not name.endswith(_INDEX_LISTS)}
    lists = {name: value for name, value in by_layer.items() if len(value) == count > 1}
    layer_kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    last = max((layer_kinds.index(layer_kind) for layer_kind in set(layer_kinds)), default=0)
    num_layers = min(count, max(2, last + 1))
    if num_layers > MAX_LAYERS:
        raise ValueError("too many layers are needed to include all kinds")
    shared = getattr(config, "num_kv_shared_layers", None)
    if shared:  # the last layers use keys of layers before them, of each kind
        num_layers = min(count, 2 * (last + 1))
        small.num_kv_shared_layers = min(shared, last + 1)
    _set(small, "num_hidden_layers", num_layers)
    for name, value in lists.items():
        setattr(small, name, list(value)[:num_layers])


def _set(config: PretrainedConfig, name: str, value: int) -> None:
    """Set an attribute by its standard name, which configurations can rename (``attribute_map``)."""
    if getattr(config, name, None) is None:
        raise ValueError(f"the configuration has no {name}")
    setattr(config, name, value)


def _fill(name: str, values: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with random values for which every part of a block has an effect: weights of unit gain, nonzero biases, and
    norm weights different from 1.
    """
    noise = torch.randn(values.shape, generator=generator)
    if values.dim() > 1:
        values.copy_(noise / math.sqrt(values[0].numel() if "embed" not in name else 1))
    elif name.endswith("bias"):
        values.copy_(0.2 * noise)
    else:
        values.copy_(1 + 0.2 * noise)
