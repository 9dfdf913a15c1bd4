"""Tiny models, tokenizers trained on a few texts, adapters with a large effect, and greedy reference completions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from deltaw.export.gguf_model import export_gguf
from deltaw.lora import LoRAConfig, attach, save_adapter
from deltaw.lora.attachment import adapter_parameters
from tests.byte_models import TEMPLATE
from tests.export.llama_cpp import SPECIAL

VOCABULARY = 400
CHAT_ML = TEMPLATE
TEXT = [
    "It's 5 o'clock and we'll see 1234 items at 99.50 euros.\n\n  Indented text with tabs\tand lines\n",
    "The quick brown fox jumps over the lazy dog, doesn't it? I've told you, he'd say: NO!",
    "def add(first, second):\n    return first + second  # the sum\n",
    "naïve café Straße Привет мир 日本語テキスト 한국어 हिन्दी 🙂",
] * 4


def _split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    splits = pre_tokenizers.Split(Regex(expression), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return pre_tokenizers.Sequence([splits, byte_level])


# Pre-tokenization of Qwen 2 and Llama 3, from their tokenizer.json files.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITTINGS: dict[str, pre_tokenizers.PreTokenizer] = {"gpt-2": _WORDS}
SPLITTINGS |= {"smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _WORDS])}
_QWEN35 = _QWEN.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
SPLITTINGS |= {"qwen35": _split_by(_QWEN35)}
SPLITTINGS |= {"qwen2": _split_by(_QWEN), "llama-bpe": _split_by(_QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))}


def byte_bpe(splitting: str, size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on :data:`TEXT` and set a chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = SPLITTINGS[splitting]
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": sorted(alphabet), "show_progress": False}
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, **options))
    names = {"eos_token": special[0], "additional_special_tokens": special[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = CHAT_ML
    return tokenizer


def sentence_bpe(*, prefix: bool, size: int = 700) -> PreTrainedTokenizerFast:
    """Train BPE with byte fallback, as in SentencePiece. Llama's variant prepends a space."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    # SentencePiece trains on words with their leading space, and encodes without pre-tokenization.
    backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *bytes_], show_progress=False)
    backend.train_from_iterator([text.replace("🙂", "") for text in TEXT], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in special]
    content["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = {"single": "<s> $A", "pair": "<s> $A <s> $B"}
    backend.post_processor = processors.TemplateProcessing(**texts, special_tokens=[("<s>", 2)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_SHAPE |= {"num_hidden_layers": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 0}
_SHAPE |= {"pad_token_id": 0}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 0, "eos_token_id": 0}
_WINDOWS = ["sliding_attention"] * 5 + ["full_attention"]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 64}
LLAMA3_ROPE |= {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_GRANITE = {"embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3, "logits_scaling": 2.0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GRANITE_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 80}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "num_hidden_layers": 3}
_MAMBA |= {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 80}
_FALCON = {"head_dim": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_d_state": 16}
_FALCON |= {"mamba_n_groups": 2, "mlp_multipliers": [0.8, 1.2], "ssm_multipliers": [0.7, 1.3, 0.9, 1.1, 0.6]}
_FALCON |= {"lm_head_multiplier": 0.9, "embedding_multiplier": 1.4, "key_multiplier": 0.7, "ssm_in_multiplier": 1.2}
_FALCON |= {"ssm_out_multiplier": 0.8, "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.1}
_GRANITE_ATTENTION = {"layer_types": ["attention"] * 3, "num_local_experts": 0, "position_embedding_type": "rope"}
_DELTA = {"head_dim": 32, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_DELTA |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
_DELTA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "num_hidden_layers": 6}
_GEMMA4_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_GEMMA4 |= {"layer_types": _GEMMA4_LAYERS, "hidden_size_per_layer_input": 0}
_GEMMA4_SHARED = {**_GEMMA4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY}
_GEMMA4_SHARED |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "num_hidden_layers": 5}
_GEMMA4_SHARED |= {"layer_types": [*_GEMMA4_LAYERS[:4], "full_attention"]}
_GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
_GEMMA4_EXPERTS |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_YARN |= {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
_LLAMA31_ROPE = {**LLAMA3_ROPE, "factor": 8.0, "original_max_position_embeddings": 8192}
_NTK_ALPHA = {"rope_type": "dynamic", "factor": 1.0, "alpha": 20.0, "rope_theta": 10000.0}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3Text", {**_GEMMA, "num_hidden_layers": 6, "layer_types": _WINDOWS}),
    "phi3": ("Phi3", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", _GRANITE),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}),
    "gpt2": ("GPT2", _GPT2),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "llama3-published": ("Llama", {"rope_parameters": _LLAMA31_ROPE, "attention_bias": True, "mlp_bias": True}),
    "olmo2-tied": ("Olmo2", {"tie_word_embeddings": True}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 4, "sliding_window": 8}),
    "granite-moe": ("GraniteMoeShared", {**_GRANITE, **_GRANITE_EXPERTS}),
    "granite-hybrid": ("GraniteMoeHybrid", {**_GRANITE, **_MAMBA, "num_local_experts": 0}),
    "granite-hybrid-moe": ("GraniteMoeHybrid", {**_GRANITE, **_MAMBA, **_GRANITE_EXPERTS}),
    "granite-attention": ("GraniteMoeHybrid", {**_GRANITE, **_MAMBA, **_GRANITE_ATTENTION}),
    "qwen3-moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3.5": ("Qwen3_5Text", _DELTA),
    "qwen3.5-moe": ("Qwen3_5MoeText", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 48}),
    "ernie4.5": ("Ernie4_5", {"head_dim": 32}),
    "exaone4": (
        "Exaone4",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3_ROPE},
    ),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16, "rope_parameters": _NTK_ALPHA}),
    "falcon-h1": ("FalconH1", {**_FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "falcon-h1-plain": ("FalconH1", _FALCON),
    "gemma4": ("Gemma4Text", _GEMMA4),
    "gemma4-shared": ("Gemma4Text", _GEMMA4_SHARED),
    "gemma4-moe": ("Gemma4Text", {**_GEMMA4, **_GEMMA4_EXPERTS}),
    "lfm2-moe": (
        "Lfm2Moe",
        {**_EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "num_dense_layers": 1},
    ),
}


# Modules of families with some that cannot be adapted, or whose updates llama.cpp ignores.
_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {family: [*_LINEAR, "in_proj"] for family in ("falcon-h1", "falcon-h1-plain")}
TARGETS |= {"gemma4-shared": [*_LINEAR, "per_layer_input_gate", "per_layer_projection"]}


def family_config(family: str, size: int = VOCABULARY, **changes: object) -> PretrainedConfig:
    """Return the configuration of a tiny model, with changes."""
    name, settings = FAMILIES[family]
    shape = {} if family == "gpt2" else _SHAPE
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(
        vocab_size=size, **{**shape, **settings, **changes}
    )
    return config


def random_model(family: str, size: int, seed: int = 0) -> PreTrainedModel:
    """Return a model in which every weight affects the output: no weight is zero and no norm is one."""
    config = family_config(family, size)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # A tied embedding is small, so that the blocks' outputs dominate the logits.
                tied = 0.06 if config.tie_word_embeddings else 0.5
                parameter.normal_(0, tied if "embed" in name or "wte" in name else 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, saved in model.state_dict().items():
            if name not in parameters and saved.is_floating_point():
                saved.add_(torch.randn_like(saved) * 0.1)  # such as the bias of a router
    return model


def saved_run(
    folder: Path, family: str, tokenizer: PreTrainedTokenizerFast | None = None, **settings: object
) -> tuple[PreTrainedModel, Path]:
    """Save a base model and an adapter. Return the adapted model and the adapter's folder."""
    tokenizer = byte_bpe("qwen2") if tokenizer is None else tokenizer
    model = random_model(family, len(tokenizer))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    attach(
        model,
        LoRAConfig(**{"rank": 4, "alpha": 8.0, "target_modules": TARGETS.get(family, "all-linear"), **settings}),
        seed=0,
    )
    randomize_adapter(model)
    save_adapter(model, folder / "run", base_model=str(folder / "base"))
    return model, folder / "run"


def base_gguf(run: Path) -> Path:
    """Export the base model by merging an adapter whose B is zero, without DoRA's rounding."""
    zero_adapter = run.parent / "zero"
    zero_adapter.mkdir()
    config = json.loads((run / "adapter_config.json").read_text())
    (zero_adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with safe_open(run / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(run / "adapter_model.safetensors")
    factors = {name: value for name, value in tensors.items() if "magnitude" not in name}
    changed = {name: value * (0 if "lora_B" in name else 1) for name, value in factors.items()}
    save_file(changed, zero_adapter / "adapter_model.safetensors", metadata)
    export_gguf(zero_adapter, run.parent / "base.gguf", kind="f32")
    return run.parent / "base.gguf"


def round_gelu(model: nn.Module) -> None:
    """Compute GELU as ggml does, which reads it from a table of 16-bit values."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        table = nn.functional.gelu(values.half().float(), approximate="tanh").half().float()
        return torch.where(values >= 10, values, torch.where(values <= -10, torch.zeros_like(values), table))

    for module in model.modules():
        if type(module).__name__ in ("GELUTanh", "NewGELUActivation"):
            module.forward = rounded  # type: ignore[method-assign]


def randomize_adapter(model: nn.Module, scale: float = 0.15) -> None:
    """Fill A and B with random numbers that change every completion."""
    generator = torch.Generator().manual_seed(0)
    for _, parameter in adapter_parameters(model):
        parameter.data.normal_(0, scale, generator=generator)


@torch.no_grad()
def greedy(model: nn.Module, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Continue prompts of equal length greedily, recomputing the full sequence for each token.

    Special tokens are excluded, as in :func:`llama_cpp.greedy`, because some of them would stop llama.cpp.
    """
    ids = torch.tensor(prompts)
    for _ in range(tokens):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1, SPECIAL:]
        ids = torch.cat([ids, SPECIAL + logits.argmax(-1, keepdim=True)], 1)
    return ids[:, len(prompts[0]) :].tolist()


def random_prompts(size: int, count: int = 20, length: int = 12) -> list[list[int]]:
    """Return random ids without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(SPECIAL, size, (count, length), generator=generator).tolist()


def delta_weight(layer: nn.Module) -> torch.Tensor:
    """Return ΔW (out, in) of an adapted layer."""
    return (layer.scaling * layer.lora_A @ layer.lora_B).t().detach()
