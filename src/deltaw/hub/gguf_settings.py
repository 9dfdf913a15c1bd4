"""Settings of a model in a ``.gguf`` file that transformers ignores.

transformers then uses its defaults, with other outputs. Sizes of heads and experts, score scales and scalings of rotary
embeddings are restored. Files with other rotary divisors are rejected.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import GGUFReader
from transformers import PretrainedConfig

from deltaw.errors import UserError

# Rotary embeddings of Llama 3.1 to 3.3, apart from the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Numbers of layers of the models whose score scale is width / heads instead of the head size, as in llama.cpp.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}


# Attributes of a configuration by names in the file.
_NUMBERS = {
    "attention.key_length": "head_dim",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Settings by tensors of files in which they are true.
_BIASES = {"blk.0.attn_output.bias": "attention_bias", "blk.0.ffn_up.bias": "mlp_bias"}


def restore_settings(reader: GGUFReader, config: PretrainedConfig) -> None:
    """Set the settings of a file that transformers ignores.

    Args:
        reader: File.
        config: Configuration that transformers read from the file. It is changed.

    Raises:
        UserError: if transformers has no equivalent of the file's rotary embeddings.
    """
    architecture = _value(reader, "general.architecture")

    def value(name: str) -> Any:
        return _value(reader, f"{architecture}.{name}")

    names = {tensor.name for tensor in reader.tensors}
    for name, attribute in _NUMBERS.items():
        number = value(name)
        if number is not None and getattr(config, attribute, None) is not None and architecture != "gemma4":
            setattr(config, attribute, type(getattr(config, attribute))(number))
    for name, attribute in _BIASES.items():
        if name in names and hasattr(config, attribute):
            setattr(config, attribute, True)
    if (layers := _SCALED_BY_WIDTH.get(config.model_type)) is not None:
        by_width = config.hidden_size / config.num_attention_heads
        config.query_pre_attn_scalar = by_width if config.num_hidden_layers == layers else config.head_dim
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    scaling = value("rope.scaling.type")
    if scaling in ("linear", "yarn") and rope.get("rope_type", "default") == "default":
        rope |= {"rope_type": scaling, "factor": float(value("rope.scaling.factor"))}
    if scaling == "yarn":
        factor = value("rope.scaling.attn_factor")
        optional = {
            "attention_factor": None if factor is None else float(factor) * (0.1 * math.log(rope["factor"]) + 1),
            "beta_fast": value("rope.scaling.yarn_beta_fast"),
            "beta_slow": value("rope.scaling.yarn_beta_slow"),
        }
        rope["original_max_position_embeddings"] = int(value("rope.scaling.original_context_length"))
        rope |= {name: float(number) for name, number in optional.items() if number is not None}
    divisors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    if "rope_freqs.weight" in divisors:
        rope |= _llama3(divisors.pop("rope_freqs.weight"), rope)
    if divisors:
        raise _unknown("LongRoPE")


def llama3_divisors(rope: dict[str, Any], count: int) -> np.ndarray:
    """Return the divisors of ``count`` rotary frequencies in Llama 3.

    Wavelengths above ``context / low_freq_factor`` are stretched by ``factor``. Those below ``context /
    high_freq_factor`` are unchanged. In between, the two frequencies are interpolated linearly in ``context /
    wavelength``.
    """
    frequencies = rope["rope_theta"] ** -(np.arange(count) / count)
    rotations = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    share = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    divisors: np.ndarray = 1 / ((1 - share) / rope["factor"] + share)
    return divisors.astype(np.float32)


def _llama3(divisors: np.ndarray, rope: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of Llama 3 with these divisors."""
    settings = {**rope, **_LLAMA3, "rope_type": "llama3", "factor": float(divisors.max())}
    if not np.allclose(llama3_divisors(settings, len(divisors)), divisors, rtol=1e-5):
        raise _unknown("other divisors than those of Llama 3")
    return settings


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _unknown(kind: str) -> UserError:
    message = f"transformers cannot read the rotary embeddings of the .gguf file ({kind})"
    return UserError(message, location="rope", hint="use the model's safetensors folder")
