"""Chat templates that behave like those of published models, and tokenizers with their special tokens.

The templates were written for these tests. Each one renders, trims, inserts, rejects and rewrites messages like the
template of the model that it is named after. They are in ``templates``, one file per family with a template.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A model family and its tokenizer.

    Attributes:
        special: Special tokens.
        eos: End-of-sequence token.
        bos: Beginning-of-sequence token, or None.
        adds_bos: True if the tokenizer prepends BOS to every text.
        plain: Added tokens that are not special.
        pieces: True for a tokenizer like SentencePiece, with ▁ for spaces. False for a byte-level tokenizer.
        prefixed: True if the tokenizer prepends a space to every text.
    """

    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    adds_bos: bool = False
    plain: tuple[str, ...] = ()
    pieces: bool = False
    prefixed: bool = False


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = tuple(f"<|{name}|>" for name in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id"))
_LLAMA3 += ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
_PHI = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_V3 = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]")
_SPM = ("<unk>", "<s>", "</s>")
_R1 = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")

FAMILIES = {
    "chatml": Family(_IM, "<|im_end|>"),
    "llama2": Family(_SPM, "</s>", "<s>", True, pieces=True, prefixed=True),
    "llama3": Family(_LLAMA3, "<|eot_id|>", "<|begin_of_text|>", True),
    "llama3.2": Family(_LLAMA3, "<|eot_id|>", "<|begin_of_text|>", True),
    "qwen2.5": Family(_IM, "<|im_end|>", plain=_THINK[2:4]),
    "qwen3": Family(_IM, "<|im_end|>", plain=_THINK),
    "gemma2": Family(_GEMMA, "<eos>", "<bos>", True, pieces=True),
    "gemma3": Family(_GEMMA, "<eos>", "<bos>", True, pieces=True),
    "mistral1": Family(_SPM, "</s>", "<s>", True, pieces=True, prefixed=True),
    "mistral3": Family((*_SPM, *_V3, "[/TOOL_RESULTS]"), "</s>", "<s>", True, pieces=True),
    "phi3": Family(_PHI, "<|endoftext|>", "<s>", pieces=True, prefixed=True),
    "phi4": Family((*_IM, "<|im_sep|>"), "<|im_end|>"),
    "phi4-mini": Family(("<|endoftext|>", *_PHI[2:], "<|tool|>", "<|/tool|>"), "<|endoftext|>"),
    "zephyr": Family(_SPM, "</s>", "<s>", True, pieces=True, prefixed=True),
    "deepseek-r1": Family(_R1, _R1[1], _R1[0], True, plain=("<think>", "</think>")),
    "generation": Family(_IM, "<|im_end|>"),
    "base": Family(("<|endoftext|>",), "<|endoftext|>"),
    "base-bos": Family(_SPM, "</s>", "<s>", True, pieces=True, prefixed=True),
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family. All text except special and added tokens is split into bytes or characters."""
    family = FAMILIES[name]
    backend = _pieces(family.special, family.prefixed) if family.pieces else _bytes(family.special)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in family.special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.plain])
    if family.adds_bos and family.bos:
        bos_special = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos_special])
    special = {"bos_token": family.bos, "eos_token": family.eos, "pad_token": family.eos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    template = Path(__file__).with_name("templates") / f"{name}.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8") if template.is_file() else None
    return tokenizer


def _bytes(special: Iterable[str]) -> Tokenizer:
    """Create a byte-level tokenizer, like those of GPT-2, Llama 3 and Qwen."""
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(special: Iterable[str], prefixed: bool) -> Tokenizer:
    """Create a tokenizer like SentencePiece, with ▁ for a space (Gemma). ``prefixed`` prepends ▁ to every text (Llama
    2).
    """
    letters = ["▁", *(chr(code) for code in range(33, 127))]
    tokens = [*dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])]
    merges = [("▁", "L"), ("▁", "S"), ("L", "i")]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefixed else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend
