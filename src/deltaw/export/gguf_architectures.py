"""GGUF support per model family: architecture name, tensor names and transforms.

llama.cpp selects its computation only by architecture name and silently ignores unsupported settings. Each family
therefore has checks, and unknown families are rejected. The ``gguf`` package provides the tensor names.

Transforms: for Llama's architecture, llama.cpp rotates adjacent pairs (x₂ᵢ, x₂ᵢ₊₁) and transformers rotates halves
(xᵢ, xᵢ₊d/2), so rows of the query and key projections are reordered. Norms of Gemma multiply by 1 + w in transformers
and by w in llama.cpp. GPT-2's Conv1D stores its weight transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor
from transformers import PretrainedConfig

from deltaw.errors import UserError

_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
CONVERTER_HINT = "merge the adapter (deltaw merge) and use convert_hf_to_gguf.py of llama.cpp"


@dataclass(frozen=True)
class Architecture:
    """Model family in llama.cpp.

    Attributes:
        arch: Identifier in the ``gguf`` package.
        activations: Activations that llama.cpp supports for the family.
        adjacent_pairs: True if query and key rows are reordered for rotary embeddings of adjacent pairs.
        norm_offset: Value added to norm weights.
        conv1d: True if the model's files store linear weights transposed.
        window_ignored: True if llama.cpp ignores the sliding window of the model.
        always_tied: True if llama.cpp does not read a separate output head.
        check: Raises a UserError for a configuration that llama.cpp does not support.
    """

    arch: MODEL_ARCH
    activations: tuple[str, ...] = _SILU
    adjacent_pairs: bool = False
    norm_offset: float = 0.0
    conv1d: bool = False
    window_ignored: bool = False
    always_tied: bool = False
    check: Callable[[PretrainedConfig], None] | None = None

    @property
    def name(self) -> str:
        """Value of ``general.architecture``."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def _check_gpt2(config: PretrainedConfig) -> None:
    is_scaled = config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights
    _refuse_if(is_scaled, config, "custom scaling of attention scores")
    _refuse_if(config.add_cross_attention, config, "cross-attention")


def _check_gemma2(config: PretrainedConfig) -> None:
    _check_score_scale(config, large=46)
    _check_windows(config, [i % 2 == 0 for i in range(config.num_hidden_layers)])


def _check_gemma3(config: PretrainedConfig) -> None:
    _check_score_scale(config, large=62)
    _check_windows(config, [(i + 1) % 6 != 0 for i in range(config.num_hidden_layers)])
    _refuse_if(getattr(config, "use_bidirectional_attention", False), config, "attention to later tokens")


def _check_smollm3(config: PretrainedConfig) -> None:
    layers = list(config.no_rope_layers)
    feature = f"layers without rotary embeddings ({layers}); it takes every fourth"
    _refuse_if(layers != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)], config, feature)


def _check_qwen(config: PretrainedConfig) -> None:
    windowed = getattr(config, "use_sliding_window", False) and "sliding_attention" in (config.layer_types or [])
    _refuse_if(windowed, config, "sliding windows in some layers")


def _check_score_scale(config: PretrainedConfig, *, large: int) -> None:
    """Check the score scale: llama.cpp uses the head size, and width / heads for the model with ``large`` layers."""
    by_width = config.hidden_size / config.num_attention_heads
    expected = by_width if config.num_hidden_layers == large else config.head_dim
    scalar = config.query_pre_attn_scalar
    _refuse_if(scalar != expected, config, f"query_pre_attn_scalar {scalar} (it takes {expected:g})")


def _check_windows(config: PretrainedConfig, windowed: list[bool]) -> None:
    differs = [kind == "sliding_attention" for kind in config.layer_types] != windowed
    _refuse_if(differs, config, "order of sliding-window and full-attention layers, unlike the published models")


_FAMILIES: dict[str, Architecture] = {
    "llama": Architecture(MODEL_ARCH.LLAMA, adjacent_pairs=True),
    "mistral": Architecture(MODEL_ARCH.LLAMA, adjacent_pairs=True, window_ignored=True),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, adjacent_pairs=True, check=_check_smollm3),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, check=_check_qwen),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, check=_check_qwen),
    "gemma": Architecture(MODEL_ARCH.GEMMA, (*_GELU_TANH, "gelu"), norm_offset=1.0, always_tied=True),
    "gemma2": Architecture(MODEL_ARCH.GEMMA2, _GELU_TANH, norm_offset=1.0, always_tied=True, check=_check_gemma2),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, _GELU_TANH, norm_offset=1.0, check=_check_gemma3),
    "phi3": Architecture(MODEL_ARCH.PHI3, window_ignored=True),
    "olmo2": Architecture(MODEL_ARCH.OLMO2),
    "granite": Architecture(MODEL_ARCH.GRANITE, adjacent_pairs=True),
    "lfm2": Architecture(MODEL_ARCH.LFM2),
    "gpt2": Architecture(MODEL_ARCH.GPT2, _GELU_TANH, conv1d=True, check=_check_gpt2),
}


def is_known_family(model_type: str) -> bool:
    """True if models of this family can be exported, unless llama.cpp lacks a feature of their configuration."""
    return model_type in _FAMILIES


def find_architecture(config: PretrainedConfig) -> Architecture:
    """Return the model family of a configuration.

    Raises:
        UserError: if the family is unknown, or llama.cpp does not support the configuration.
    """
    architecture = _FAMILIES.get(config.model_type)
    if architecture is None:
        hint = f"supported are {', '.join(sorted(_FAMILIES))}; otherwise {CONVERTER_HINT}"
        raise UserError(f"deltaw does not export '{config.model_type}' models to GGUF", location="model", hint=hint)
    keys = ("hidden_activation", "hidden_act", "activation_function")
    configured = [value for key in keys if (value := getattr(config, key, None)) is not None]
    activation = configured[0] if configured else architecture.activations[0]
    feature = f"the activation '{activation}' (it computes {architecture.activations[0]})"
    _refuse_if(activation not in architecture.activations, config, feature)
    if architecture.check is not None:
        architecture.check(config)
    return architecture


def head_size(config: PretrainedConfig) -> int:
    """Return the dimension of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_heads(config: PretrainedConfig) -> int:
    """Return the number of key and value heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class TensorNames:
    """Maps tensor names and values of a model to those of a GGUF file."""

    def __init__(self, architecture: Architecture, config: PretrainedConfig) -> None:
        self._map = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
        self._architecture = architecture
        # Number of heads of the projections with reordered rows.
        self._heads = {"q_proj": int(config.num_attention_heads), "k_proj": key_heads(config)}

    def of_module(self, module: str) -> str | None:
        """Return the GGUF name of a module such as ``blk.0.attn_q``, or None if the architecture lacks it."""
        name = self._map.get_name(module)
        return None if name is None else str(name)

    def of_tensor(self, tensor: str) -> str | None:
        """Return the GGUF name of a tensor such as ``blk.0.attn_q.weight``, if it has one."""
        module, _, attribute = tensor.rpartition(".")
        name = self.of_module(module) if attribute in ("weight", "bias") else None
        return None if name is None else f"{name}.{attribute}"

    def outputs(self, module: str, rows: Tensor) -> Tensor:
        """Return the rows of a weight (out, in), a bias (out) or a factor B (out, r) in llama.cpp's order."""
        heads = self._heads.get(module.rpartition(".")[2]) if self._architecture.adjacent_pairs else None
        return rows if heads is None else adjacent_pairs(rows, heads)

    def values(self, tensor: str, value: Tensor) -> Tensor:
        """Return a complete tensor as it is stored in a GGUF file, in fp32."""
        module, _, attribute = tensor.rpartition(".")
        value = value.float()
        if module.endswith("norm") and attribute == "weight":
            return value + self._architecture.norm_offset
        if _is_convolution(tensor):
            return value.squeeze(1)
        return value.t().contiguous() if self._is_conv1d(tensor) else self.outputs(module, value)

    def shape(self, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the result of :meth:`values`."""
        if _is_convolution(tensor):
            return shape[0], shape[2]
        return shape[::-1] if self._is_conv1d(tensor) else shape

    def _is_conv1d(self, tensor: str) -> bool:
        return self._architecture.conv1d and tensor.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _is_convolution(tensor: str) -> bool:
    """True for the weight (channels, 1, width) of a depthwise convolution."""
    return tensor.endswith(".conv.conv.weight")


def adjacent_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from halves (xᵢ, xᵢ₊d/2) to adjacent pairs (x₂ᵢ, x₂ᵢ₊₁).

    Args:
        rows: (heads · d, …) rows with even d.
        heads: Number of heads.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return torch.movedim(halves, 1, 2).reshape(rows.shape)


def _refuse_if(is_unsupported: bool, config: PretrainedConfig, feature: str) -> None:
    if is_unsupported:
        hint = "serve it with deltaw serve, or merge it (deltaw merge) for another program"
        message = f"llama.cpp does not support this {config.model_type} model's {feature}"
        raise UserError(message, location="model", hint=hint)
