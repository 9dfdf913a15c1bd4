"""How each family of models stands in a GGUF file: the architecture's name, names of tensors, and transforms.

llama.cpp knows a model by its architecture's name and computes by that name alone. What a configuration asks
for beyond that would be lost in silence, so a family comes with checks, and a family that is not listed is
refused by name. Names of tensors come from the ``gguf`` package.

Sources of the transforms: llama.cpp turns adjacent pairs of a head's numbers (x₂ᵢ, x₂ᵢ₊₁) for Llama's own
architecture, transformers halves (xᵢ, xᵢ₊d/2), so rows of the query and key projections are reordered. Norms
of Gemma multiply by 1 + w in transformers and by w in llama.cpp. GPT-2's Conv1D stores its weight transposed.
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
OWN_CONVERTER = "merge the adapter (deltaw merge) and use llama.cpp's own convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Architecture:
    """A family, as llama.cpp has it.

    Attributes:
        arch: the ``gguf`` package's number of it.
        activations: the activations that llama.cpp computes for it.
        adjacent_pairs: whether query and key rows are reordered for rotary pairs that lie side by side.
        norm_offset: added to the weights of norms.
        conv1d: whether weights of linear layers are stored transposed in the model's files.
        window_ignored: llama.cpp attends to all tokens where the model has a sliding window.
        always_tied: llama.cpp reads no output head of its own.
        check: raises a UserError where the configuration asks for what llama.cpp does not compute.
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
        """As in ``general.architecture``."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def _check_gpt2(config: PretrainedConfig) -> None:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise _lost(config, "its own scaling of attention scores")
    if config.add_cross_attention:
        raise _lost(config, "cross-attention")


def _check_gemma2(config: PretrainedConfig) -> None:
    _check_score_scale(config, large=46)
    _check_windows(config, [i % 2 == 0 for i in range(config.num_hidden_layers)])


def _check_gemma3(config: PretrainedConfig) -> None:
    _check_score_scale(config, large=62)
    _check_windows(config, [(i + 1) % 6 != 0 for i in range(config.num_hidden_layers)])
    if getattr(config, "use_bidirectional_attention", False):
        raise _lost(config, "attention to later tokens")


def _check_smollm3(config: PretrainedConfig) -> None:
    turned = [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != turned:
        raise _lost(config, f"other layers without rotary positions than each fourth ({config.no_rope_layers})")


def _check_qwen(config: PretrainedConfig) -> None:
    if getattr(config, "use_sliding_window", False) and "sliding_attention" in (config.layer_types or []):
        raise _lost(config, "sliding windows in some layers")


def _check_score_scale(config: PretrainedConfig, *, large: int) -> None:
    """llama.cpp scales by the head's size, and in the model of ``large`` layers by width over heads."""
    by_width = config.hidden_size / config.num_attention_heads
    expected = by_width if config.num_hidden_layers == large else config.head_dim
    if config.query_pre_attn_scalar != expected:
        raise _lost(config, f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it takes {expected:g})")


def _check_windows(config: PretrainedConfig, windowed: list[bool]) -> None:
    if [kind == "sliding_attention" for kind in config.layer_types] != windowed:
        raise _lost(config, "another order of windowed and full layers than the published models have")


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
    "gpt2": Architecture(MODEL_ARCH.GPT2, _GELU_TANH, conv1d=True, check=_check_gpt2),
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The family of a model.

    Raises:
        UserError: the family is not known here, or llama.cpp does not compute what is configured.
    """
    found = _FAMILIES.get(config.model_type)
    if found is None:
        hint = f"known are {', '.join(sorted(_FAMILIES))}; otherwise {OWN_CONVERTER}"
        raise UserError(f"'{config.model_type}' models are not exported to GGUF here", where="model", hint=hint)
    keys = ("hidden_activation", "hidden_act", "activation_function")
    named = [value for key in keys if (value := getattr(config, key, None)) is not None]
    activation = named[0] if named else found.activations[0]
    if activation not in found.activations:
        raise _lost(config, f"the activation '{activation}' (it computes {found.activations[0]})")
    if found.check is not None:
        found.check(config)
    return found


def head_size(config: PretrainedConfig) -> int:
    """Numbers of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_heads(config: PretrainedConfig) -> int:
    """Heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


class TensorNames:
    """Names and transforms of a model's tensors in a GGUF file."""

    def __init__(self, architecture: Architecture, config: PretrainedConfig) -> None:
        self._map = gguf.get_tensor_name_map(architecture.arch, config.num_hidden_layers)
        self._architecture = architecture
        # The heads whose rows are reordered, by the module's own name.
        self._heads = {"q_proj": int(config.num_attention_heads), "k_proj": key_heads(config)}

    def of_module(self, module: str) -> str | None:
        """``blk.0.attn_q`` of a module's name; None for one that the architecture does not have."""
        found = self._map.get_name(module)
        return None if found is None else str(found)

    def of_tensor(self, tensor: str) -> str | None:
        """``blk.0.attn_q.weight`` of a tensor's name."""
        module, _, last = tensor.rpartition(".")
        found = self.of_module(module) if last in ("weight", "bias") else None
        return None if found is None else f"{found}.{last}"

    def outputs(self, module: str, rows: Tensor) -> Tensor:
        """The rows of a weight (out, in), a bias (out) or a factor B (out, r), in llama.cpp's order."""
        heads = self._heads.get(module.rpartition(".")[2]) if self._architecture.adjacent_pairs else None
        return rows if heads is None else adjacent_pairs(rows, heads)

    def values(self, tensor: str, value: Tensor) -> Tensor:
        """A whole tensor of the model as it stands in a GGUF file, in fp32."""
        module, _, last = tensor.rpartition(".")
        value = value.float()
        if module.endswith("norm") and last == "weight":
            return value + self._architecture.norm_offset
        return value.t().contiguous() if self._is_conv1d(tensor) else self.outputs(module, value)

    def shape(self, tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that :meth:`values` gives."""
        return shape[::-1] if self._is_conv1d(tensor) else shape

    def _is_conv1d(self, tensor: str) -> bool:
        return self._architecture.conv1d and tensor.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def adjacent_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from halves (xᵢ, xᵢ₊d/2) to neighbors (x₂ᵢ, x₂ᵢ₊₁).

    Args:
        rows: (heads · d, …), d even.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return torch.movedim(halves, 1, 2).reshape(rows.shape)


def _lost(config: PretrainedConfig, what: str) -> UserError:
    hint = "serve it with deltaw serve, or merge it (deltaw merge) for another program"
    return UserError(f"llama.cpp does not compute this {config.model_type} model's {what}", where="model", hint=hint)
