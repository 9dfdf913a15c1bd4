"""Tokenizer metadata for GGUF files: tokens, token types, merges or scores, special tokens and the chat template.

Two types are supported. Byte-level BPE (``gpt2``) has merges and a named pre-tokenizer. SentencePiece BPE (``llama``)
has a score per token: the pair of neighbors with the highest score is merged first, so the score is the negated rank of
the merge.

A GGUF file contains only the name of a byte-level pre-tokenizer (``tokenizer.ggml.pre``). The name is determined by
behavior: a probe text is split by the tokenizer and by each known pre-tokenizer, and the results are compared.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.export.gguf_architectures import CONVERTER_HINT
from deltaw.export.gguf_file import add_optional
from deltaw.hub.terminators import turn_ends

# Contractions, digits, white space, punctuation, scripts with and without case, combining marks, and their transitions.
_PROBE = (
    "It's 5 o'clock, WE'LL see: 1234567 items at 99.50€!\n\n  Indented   text\t\twith tabs \n\r\nand lines"
    "\n \n   end   \nx=(a+b)*c[0]//2;  # note...?! --flag=\"yes\" don't DON'T you'Ve café cafe\u0301 "
    "naïve Straße ÀÉ Привет мир 12 日本語テキスト、東京2024年 한국어 텍스트 हिन्दी पाठ ١٢٣ 🙂👍🏽 end…\n\n\n"
    "CamelCaseWord snake_case HTTPServer2 a/b\\c <tag> </tag>\n\t- item 1\n\t- item 22\n 'quoted' ''' word"
    " / slashes//\n/path 3.14159 1,000,000 ½ x²\u00a0nbsp \u3000wide"
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_WORDS_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _split_by(*parts: str) -> PreTokenizer:
    """Return a pre-tokenizer that splits by alternatives of a regular expression, without GPT-2's pattern."""
    split = pre_tokenizers.Split(Regex("|".join(parts)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def _pre_tokenizers() -> dict[str, PreTokenizer]:
    """Return the pre-tokenizers by llama.cpp's names. The first match is used."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    gpt_4o = [f"{pattern}{_CONTRACTIONS}?" for pattern in _CASED]
    return {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "qwen2": _split_by(_CONTRACTIONS, _WORDS, r"\p{N}", _MARKS, _SPACES),
        "qwen35": _split_by(_CONTRACTIONS, _WORDS_MARKS, r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES),
        "llama-bpe": _split_by(_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _MARKS, _SPACES),
        "tekken": _split_by(*_CASED, r"\p{N}", _MARKS_SLASH, _SPACES),
        "gpt-4o": _split_by(*gpt_4o, r"\p{N}{1,3}", _MARKS_SLASH, _SPACES),
    }


def pre_tokenizer_name(backend: Tokenizer) -> str:
    """Return llama.cpp's name of the pre-tokenizer of ``backend``.

    Raises:
        UserError: if no supported pre-tokenizer splits the probe text in the same way.
    """
    pre_tokenizer = backend.pre_tokenizer
    if pre_tokenizer is not None:
        pieces = _pieces(pre_tokenizer)
        for name, candidate in _pre_tokenizers().items():
            if _pieces(candidate) == pieces:
                return name
    message = "llama.cpp has no name for the tokenizer's pre-tokenizer"
    hint = f"supported are {', '.join(_pre_tokenizers())}; or use the base model's .gguf file with --model"
    raise UserError(message, location="tokenizer.json: pre_tokenizer", hint=hint)


def _pieces(splitter: PreTokenizer) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(_PROBE)]


_SPACE = "\u2581"  # space in SentencePiece tokens


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer content of a GGUF file.

    Attributes:
        model: llama.cpp's name of the type, ``gpt2`` or ``llama``.
        pre: llama.cpp's name of the pre-tokenizer.
        tokens, types: Tokens and token types by id.
        merges: Merges as "left right", for ``gpt2``.
        scores: Scores by id, for ``llama``.
        space_prefix: Whether a space is added before each text, if applicable.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool | None = None


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> PreTrainedTokenizerBase:
    """Raise a UserError if the model in ``folder`` has no tokenizer."""
    if tokenizer is None:
        message = "the model's folder contains no tokenizer, which a GGUF file requires"
        raise UserError(message, location=str(folder), hint="copy the tokenizer's files there")
    return tokenizer


def add_tokenizer(out: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, terminators: Iterable[int]) -> None:
    """Write the metadata of a tokenizer.

    Args:
        out: Writer of the file.
        tokenizer: Fast tokenizer.
        size: Number of rows of the model's embedding. Ids without a token are marked as unused.
        terminators: Ids of the tokens that end an answer.

    Raises:
        UserError: if llama.cpp does not support the tokenizer.
    """
    vocabulary = extract_vocabulary(tokenizer, size)
    out.add_tokenizer_model(vocabulary.model)
    out.add_tokenizer_pre(vocabulary.pre)
    out.add_token_list(vocabulary.tokens)
    add_optional(out.add_token_scores, vocabulary.scores)
    out.add_token_types(vocabulary.types)
    add_optional(out.add_token_merges, vocabulary.merges)
    add_optional(out.add_add_space_prefix, vocabulary.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        add_optional(getattr(out, f"add_{name}_token_id"), getattr(tokenizer, f"{name}_token_id"))
    turn_terminators = [token for token in turn_ends(tokenizer) if token in {*terminators} - {tokenizer.eos_token_id}]
    if turn_terminators:
        out.add_eot_token_id(turn_terminators[-1])
    added = list(tokenizer("a")["input_ids"])
    out.add_add_bos_token(tokenizer.bos_token_id is not None and added[0] == tokenizer.bos_token_id)
    out.add_add_eos_token(tokenizer.eos_token_id is not None and added[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        add_chat_template(out, tokenizer.chat_template)


def add_chat_template(out: GGUFWriter, template: str | dict[str, str]) -> None:
    """Write one chat template, or several named ones."""
    if isinstance(template, str):
        out.add_chat_template(template)
    else:
        out.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def extract_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """Return the vocabulary of ``tokenizer`` for an embedding with ``size`` rows.

    Raises:
        UserError: if the tokenizer is not supported or has more tokens than the embedding has rows.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown(type(tokenizer).__name__)
    backend = tokenizer.backend_tokenizer
    serialized: dict[str, Any] = json.loads(backend.to_str())
    model = serialized["model"]
    if model["type"] != "BPE":
        raise _unknown(model["type"])
    if max(tokenizer.get_vocab().values()) >= size:
        message = f"the tokenizer has more tokens than the model's embedding has rows ({size})"
        raise UserError(message, location="tokenizer.json", hint="use the tokenizer of the model")
    tokens, types = _tokens(tokenizer, model, size)
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    if not pairs:
        raise _unknown("BPE without merges")
    if not model["byte_fallback"]:
        return Vocabulary("gpt2", pre_tokenizer_name(backend), tokens, types, merges=[" ".join(pair) for pair in pairs])
    if model["dropout"] or not any(_SPACE in token for token in model["vocab"]):
        raise _unknown("byte-fallback BPE other than SentencePiece")
    ranks: dict[str, int] = {}
    for rank, (first, second) in enumerate(pairs):
        ranks.setdefault(first + second, rank)
    # Other tokens are never merged: single characters, bytes and special tokens.
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    prefix = (tokenizer.tokenize("a") or [""])[0].startswith(_SPACE)
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=prefix)


# Control tokens that their tokenizer does not mark as special, such as Gemma's pad. _BYTE matches byte tokens.
_SPECIAL = re.compile(r"<pad>|<mask>|\[@BOS@\]|<2mass>|<\|(.*\|)?>|<unused.*>", re.DOTALL)
_BYTE = re.compile(r"<0x..>", re.DOTALL)


def _tokens(tokenizer: PreTrainedTokenizerFast, model: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in model["vocab"].items()}
    bytes_as_tokens = bool(model["byte_fallback"])
    tokens = []
    types = []
    added = tokenizer.added_tokens_decoder
    for number in range(size):
        token = by_id.get(number, f"[PAD{number}]")
        kind = TokenType.UNUSED
        if number in added:
            token = added[number].content
            is_special = added[number].special or _SPECIAL.fullmatch(token)
            kind = TokenType.CONTROL if is_special else TokenType.USER_DEFINED
            token = token if is_special else token.replace(_SPACE, " ")
        elif number in by_id:
            kind = TokenType.BYTE if bytes_as_tokens and _BYTE.fullmatch(token) else TokenType.NORMAL
        tokens.append(token)
        types.append(kind)
    if bytes_as_tokens and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _unknown(kind: str) -> UserError:
    hint = f"supported are byte-level BPE and SentencePiece BPE; otherwise {CONVERTER_HINT}"
    return UserError(f"deltaw does not export '{kind}' tokenizers to GGUF", location="tokenizer.json", hint=hint)
