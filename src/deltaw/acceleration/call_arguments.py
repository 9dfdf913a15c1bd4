"""Arguments of a call of a model that runs packed rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

from deltaw.acceleration.accelerated_model import Unsupported

_ROW_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
# Arguments that do not change the result of a backbone: the packed rows, which its positions also describe, and the
# number of labels.
_WITHOUT_EFFECT = frozenset(
    {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "num_items_in_batch"}
)
# Arguments whose default is an attribute of the model's configuration.
_DEFAULTS_IN_CONFIG = {
    "output_hidden_states": False,
    "output_attentions": False,
    "output_router_logits": False,
    "return_dict": True,
}


class MissingCache(Cache):
    """Keys and values of a training call, which are not computed. Code that uses them fails.

    A script that needs them passes ``use_cache=True``.
    """

    def __init__(self) -> None:
        # The attributes of a cache are missing, so that __getattr__ is called for them.
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(
            "an accelerated model returns no keys and values in training, unless the call passes use_cache=True"
        )


def returns_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """True if a call returns keys and values."""
    cache = arguments.get("use_cache")
    config = model.config.get_text_config()
    # Encoders have an attribute that makes them decoders.
    default = getattr(config, "use_cache", False) and getattr(config, "is_decoder", True)
    return bool(default if cache is None else cache)


def row_inputs(
    model: PreTrainedModel, arguments: Mapping[str, Any], others: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Return the inputs of rows among the arguments of a call.

    Args:
        model: Model that is called.
        arguments: Arguments by name.
        others: Names of arguments that the caller handles.

    Raises:
        Unsupported: if other arguments are set, or if the model returns more than its last hidden states.
    """
    inputs = {name: arguments[name] for name in _ROW_INPUTS if arguments.get(name) is not None}
    _check_shapes(inputs)
    for name, value in arguments.items():
        is_default = value is None or value is False or name in _DEFAULTS_IN_CONFIG
        if name == "use_cache" or name in inputs or name in others or name in _WITHOUT_EFFECT or is_default:
            continue
        raise Unsupported(f"calls with {name}")
    for name, default in _DEFAULTS_IN_CONFIG.items():
        value = arguments.get(name)
        value = getattr(model.config, name, default) if value is None else value
        if value is not default:
            raise Unsupported(f"calls with {name}={value}")
    if arguments.get("use_cache"):
        raise Unsupported("calls with use_cache=True")
    if "position_ids" in inputs and "attention_mask" not in inputs and returns_cache(model, arguments):
        # transformers only separates rows by their positions in calls without a cache.
        raise Unsupported("rows without padding, unless use_cache=False is passed")
    return inputs


def _check_shapes(inputs: Mapping[str, Any]) -> None:
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.numel() == 0:
        raise Unsupported("calls without input_ids of two dimensions")
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
        raise Unsupported("an attention mask that is not a mask of padding")
