"""Model families that are exported to GGUF.

llama.cpp selects its computation only by architecture name and silently ignores unsupported settings. Each family
therefore has checks, and unknown families are rejected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import gguf
from gguf import MODEL_ARCH
from transformers import PretrainedConfig

from deltaw.errors import UserError
from deltaw.export import gguf_attention as attention
from deltaw.export import gguf_recurrent as recurrent
from deltaw.export.gguf_attention import Hyperparameters
from deltaw.export.gguf_checks import check_head_size, refuse_if
from deltaw.export.gguf_tensors import TensorForms, TensorRule

_SILU = ("silu", "swish")
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
CONVERTER_HINT = "merge the adapter (deltaw merge) and use convert_hf_to_gguf.py of llama.cpp"


@dataclass(frozen=True)
class Architecture:
    """Model family in llama.cpp.

    Attributes:
        arch: Identifier in the ``gguf`` package.
        activations: Activations that llama.cpp supports for the family.
        rules: Returns the rules of tensors that are not stored unchanged.
        values: Returns hyperparameters in addition to those of all families, or instead of them.
        rope_types: Types of rotary embeddings that llama.cpp supports for the family.
        partial_rotary: True if a part of a head may be rotated.
        biases: Regular expression of modules in the file that may have a bias.
        window_ignored: True if llama.cpp ignores the sliding window of the model.
        always_tied: True if llama.cpp does not read a separate output head.
        never_tied: True if llama.cpp requires a separate output head.
        check: Raises a UserError for a configuration that llama.cpp does not support.
    """

    arch: MODEL_ARCH
    activations: tuple[str, ...] = _SILU
    rules: Callable[[PretrainedConfig], Sequence[TensorRule]] = lambda config: ()
    values: Callable[[PretrainedConfig], Hyperparameters] = lambda config: {}
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rotary: bool = False
    biases: str = ""
    window_ignored: bool = False
    always_tied: bool = False
    never_tied: bool = False
    check: Callable[[PretrainedConfig], None] | None = None

    @property
    def name(self) -> str:
        """Value of ``general.architecture``."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])

    def has_tensor(self, name: str) -> bool:
        """Return False for a bias in the file that llama.cpp has no tensor for."""
        match = re.fullmatch(r"(?:blk\.\d+\.)?(.+)\.bias", name)
        return match is None or re.fullmatch(self.biases, match[1]) is not None

    def forms(self, config: PretrainedConfig, *, tied: bool) -> TensorForms:
        """Return the map of tensors for a model of the family, whose head and embedding may be tied."""
        rules = list(self.rules(config))
        if self.never_tied and tied:
            names = ("token_embd.weight", "output.weight")
            rules += [TensorRule(r"embed_tokens\.weight", name, outside_blocks=True) for name in names]
        return TensorForms(self.arch, config.num_hidden_layers, rules)


_QKV = "attn_[qkv]"
_ALL_LINEAR = r"attn_(?:[qkv]|output)|ffn_(?:gate|up|down)"
_MAMBA = "ssm_conv1d|ssm_dt"
_GRANITE = Architecture(
    MODEL_ARCH.GRANITE,
    rules=recurrent.granite_rules,
    values=recurrent.granite_values,
    biases=f"{_ALL_LINEAR}|{_MAMBA}",
    check=recurrent.check_granite,
)
_LLAMA3 = (*Architecture.rope_types, "llama3")
_LLAMA = Architecture(MODEL_ARCH.LLAMA, rules=attention.paired_rules, rope_types=_LLAMA3, biases=_ALL_LINEAR)
_LONG = (*Architecture.rope_types, "longrope")
_FAMILIES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, window_ignored=True),
    "smollm3": Architecture(MODEL_ARCH.SMOLLM3, rules=attention.paired_rules, check=attention.check_smollm3),
    "qwen2": Architecture(MODEL_ARCH.QWEN2, biases=_QKV, check=attention.check_qwen2),
    "qwen3": Architecture(MODEL_ARCH.QWEN3, check=attention.check_qwen),
    "qwen3_moe": Architecture(
        MODEL_ARCH.QWEN3MOE,
        rules=attention.qwen3_moe_rules,
        values=attention.qwen3_moe_values,
        check=attention.check_qwen3_moe,
    ),
    "qwen3_5_text": Architecture(
        MODEL_ARCH.QWEN35,
        rules=recurrent.qwen35_rules,
        values=recurrent.qwen35_values,
        partial_rotary=True,
        biases="ssm_dt",
        check=recurrent.check_qwen35,
    ),
    "qwen3_5_moe_text": Architecture(
        MODEL_ARCH.QWEN35MOE,
        rules=recurrent.qwen35_moe_rules,
        values=recurrent.qwen35_moe_values,
        partial_rotary=True,
        biases="ssm_dt",
        check=recurrent.check_qwen35,
    ),
    "gemma": Architecture(MODEL_ARCH.GEMMA, (*_GELU_TANH, "gelu"), rules=attention.gemma_rules, always_tied=True),
    "gemma2": Architecture(
        MODEL_ARCH.GEMMA2,
        _GELU_TANH,
        rules=attention.gemma_rules,
        values=attention.gemma_values,
        always_tied=True,
        check=attention.check_gemma2,
    ),
    "gemma3_text": Architecture(
        MODEL_ARCH.GEMMA3,
        _GELU_TANH,
        rules=attention.gemma_rules,
        values=attention.gemma_values,
        check=attention.check_gemma3,
    ),
    "gemma4_text": Architecture(
        MODEL_ARCH.GEMMA4,
        _GELU_TANH,
        rules=attention.gemma4_rules,
        values=attention.gemma4_values,
        rope_types=("proportional",),
        partial_rotary=True,
        check=attention.check_gemma4,
    ),
    "phi3": Architecture(
        MODEL_ARCH.PHI3,
        values=lambda config: {"sliding_window": 0},
        rope_types=_LONG,
        partial_rotary=True,
        window_ignored=True,
        check=check_head_size,
    ),
    "olmo2": Architecture(MODEL_ARCH.OLMO2, never_tied=True, check=check_head_size),
    "olmo3": Architecture(
        MODEL_ARCH.OLMO2, values=attention.olmo3_values, never_tied=True, check=attention.check_olmo3
    ),
    "ernie4_5": Architecture(MODEL_ARCH.ERNIE4_5),
    "exaone4": Architecture(
        MODEL_ARCH.EXAONE4,
        values=lambda config: {"sliding_window": config.sliding_window},
        rope_types=_LLAMA3,
        check=attention.check_exaone4,
    ),
    "hunyuan_v1_dense": Architecture(
        MODEL_ARCH.HUNYUAN_DENSE,
        values=attention.hunyuan_values,
        rope_types=("default", "dynamic"),
        check=attention.check_hunyuan,
    ),
    "falcon_h1": Architecture(
        MODEL_ARCH.FALCON_H1,
        rules=recurrent.falcon_rules,
        values=recurrent.mamba_values,
        biases=_MAMBA,
        check=recurrent.check_falcon,
    ),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, arch=MODEL_ARCH.GRANITE_MOE),
    "granitemoeshared": replace(_GRANITE, arch=MODEL_ARCH.GRANITE_MOE),
    "granitemoehybrid": replace(_GRANITE, arch=MODEL_ARCH.GRANITE_HYBRID),
    "lfm2": Architecture(
        MODEL_ARCH.LFM2, rules=recurrent.lfm2_rules, values=recurrent.lfm2_values, check=recurrent.check_lfm2
    ),
    "lfm2_moe": Architecture(
        MODEL_ARCH.LFM2MOE,
        rules=recurrent.lfm2_rules,
        values=recurrent.lfm2_values,
        biases="exp_probs_b",
        check=recurrent.check_lfm2_moe,
    ),
    "gpt2": Architecture(
        MODEL_ARCH.GPT2,
        _GELU_TANH,
        rules=attention.gpt2_rules,
        values=attention.gpt2_values,
        biases=".+",
        check=attention.check_gpt2,
    ),
}


def is_known_family(model_type: str) -> bool:
    """True if models of this family can be exported, unless llama.cpp lacks a feature of their configuration."""
    return model_type in _FAMILIES


def find_architecture(config: PretrainedConfig) -> Architecture:
    """Return the model family of a configuration.

    Raises:
        UserError: if the family is unknown, or llama.cpp does not support the configuration.
    """
    family = config.model_type
    if family == "granitemoehybrid" and "linear_attention" not in config.layer_types:
        family = "granitemoe" if config.num_local_experts else "granite"
    architecture = _FAMILIES.get(family)
    if architecture is None:
        hint = f"supported are {', '.join(sorted(_FAMILIES))}; otherwise {CONVERTER_HINT}"
        raise UserError(f"deltaw does not export '{config.model_type}' models to GGUF", location="model", hint=hint)
    keys = ("hidden_activation", "hidden_act", "activation_function")
    configured = [value for key in keys if (value := getattr(config, key, None)) is not None]
    activation = configured[0] if configured else architecture.activations[0]
    feature = f"the activation '{activation}' (it computes {architecture.activations[0]})"
    refuse_if(activation not in architecture.activations, config, feature)
    if architecture.check is not None:
        architecture.check(config)
    return architecture
