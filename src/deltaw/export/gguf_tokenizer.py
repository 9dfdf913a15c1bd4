"""A tokenizer as GGUF metadata: tokens, their kinds, merges or scores, special tokens, the chat template.

Two kinds are known. Byte-level BPE (``gpt2``) has merges, and a splitting that is only named. The BPE of
SentencePiece (``llama``) has a score for each token: of all neighbors, those whose union has the highest
score are joined first, so the rank of the merge that makes a token, negated, is its score.

It knows tokenizers of the ``tokenizers`` library; no weights and no model.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.export.gguf_architectures import OWN_CONVERTER
from deltaw.hub.terminators import turn_ends

# A GGUF file names the splitting of a byte-level tokenizer (``tokenizer.ggml.pre``) instead of holding it. A
# tokenizer's own rules are recognized by what they do: a probe text is split by them and by the rules behind each name,
# and the pieces are compared. So the vocabulary does not matter, and neither does how a rule is written down.


# Contractions, runs of digits, of spaces, line ends and marks, scripts with and without letter case,
# combining marks, and what stands at the borders between them.
_PROBE = (
    "It's 5 o'clock, WE'LL see: 1234567 items at 99.50€!\n\n  Indented   text\t\twith tabs \n\r\nand lines"
    "\n \n   end   \nx=(a+b)*c[0]//2;  # note...?! --flag=\"yes\" don't DON'T you'Ve café cafe\u0301 "
    "naïve Straße ÀÉ Привет мир 12 日本語テキスト、東京2024年 한국어 텍스트 हिन्दी पाठ ١٢٣ 🙂👍🏽 end…\n\n\n"
    "CamelCaseWord snake_case HTTPServer2 a/b\\c <tag> </tag>\n\t- item 1\n\t- item 22\n 'quoted' ''' word"
    " / slashes//\n/path 3.14159 1,000,000 ½ x²\u00a0nbsp \u3000wide"
)

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_MARKS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _by(*parts: str) -> PreTokenizer:
    """Split by one expression of alternatives, without GPT-2's own."""
    split = pre_tokenizers.Split(Regex("|".join(parts)), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def _known() -> dict[str, PreTokenizer]:
    """llama.cpp's names, and the rules behind them. The first that fits is taken."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    gpt_4o = [f"{one}{_CONTRACTIONS}?" for one in _CASED]
    return {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "qwen2": _by(_CONTRACTIONS, _WORDS, r"\p{N}", _MARKS, _SPACES),
        "llama-bpe": _by(_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _MARKS, _SPACES),
        "tekken": _by(*_CASED, r"\p{N}", _MARKS_SLASH, _SPACES),
        "gpt-4o": _by(*gpt_4o, r"\p{N}{1,3}", _MARKS_SLASH, _SPACES),
    }


def splitting_of(backend: Tokenizer) -> str:
    """llama.cpp's name of the splitting that ``backend`` has.

    Raises:
        UserError: none of those that are known here splits the probe text as it does.
    """
    own = backend.pre_tokenizer
    if own is not None:
        pieces = _pieces(own)
        for name, known in _known().items():
            if _pieces(known) == pieces:
                return name
    what = "the tokenizer splits text in a way that has no known name in llama.cpp"
    hint = f"known are {', '.join(_known())}; or name the base model's .gguf file with --model, to use its metadata"
    raise UserError(what, where="tokenizer.json: pre_tokenizer", hint=hint)


def _pieces(splitter: PreTokenizer) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(_PROBE)]


_SPACE = "\u2581"  # with which SentencePiece writes a space


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer goes into a file.

    Attributes:
        model: llama.cpp's name of the kind, ``gpt2`` or ``llama``.
        pre: its name of the splitting.
        tokens, types: by id.
        merges: "left right" each, of ``gpt2``. scores: by id, of ``llama``.
        space_prefix: whether a space is put before each text; None where that is no question.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool | None = None


def add_tokenizer(out: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, ends: Iterable[int]) -> None:
    """Write a tokenizer's metadata.

    Args:
        out: takes it.
        tokenizer: a fast one.
        size: rows of the model's embedding; ids without a token are marked as unused.
        ends: ids of the tokens that end an answer.

    Raises:
        UserError: the tokenizer is of a kind that llama.cpp does not know.
    """
    vocabulary = vocabulary_of(tokenizer, size)
    out.add_tokenizer_model(vocabulary.model)
    out.add_tokenizer_pre(vocabulary.pre)
    out.add_token_list(vocabulary.tokens)
    if vocabulary.scores is not None:
        out.add_token_scores(vocabulary.scores)
    out.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        out.add_token_merges(vocabulary.merges)
    if vocabulary.space_prefix is not None:
        out.add_add_space_prefix(vocabulary.space_prefix)
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(out, f"add_{name}_token_id")(int(token))
    turns = [token for token in turn_ends(tokenizer) if token in set(ends)]
    others = [token for token in turns if token != tokenizer.eos_token_id]
    if others:
        out.add_eot_token_id(others[-1])
    added = list(tokenizer("a")["input_ids"])
    out.add_add_bos_token(tokenizer.bos_token_id is not None and added[0] == tokenizer.bos_token_id)
    out.add_add_eos_token(tokenizer.eos_token_id is not None and added[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        add_chat_template(out, tokenizer.chat_template)


def add_chat_template(out: GGUFWriter, template: str | dict[str, str]) -> None:
    """Write one template, or several by name."""
    if isinstance(template, str):
        out.add_chat_template(template)
    else:
        out.add_chat_template([{"name": name, "template": text} for name, text in template.items()])


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """What of ``tokenizer`` goes into a file, for a model whose embedding has ``size`` rows."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unknown(type(tokenizer).__name__)
    backend = tokenizer.backend_tokenizer
    described: dict[str, Any] = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _unknown(model["type"])
    if max(tokenizer.get_vocab().values()) >= size:
        what = f"the tokenizer has more tokens than the model's embedding has rows ({size})"
        raise UserError(what, where="tokenizer.json", hint="give the tokenizer that belongs to the model")
    tokens, types = _tokens(tokenizer, model["vocab"], size, bytes_as_tokens=bool(model["byte_fallback"]))
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    if not pairs:
        raise _unknown("BPE without merges")
    if not model["byte_fallback"]:
        merges = [" ".join(pair) for pair in pairs]
        return Vocabulary("gpt2", splitting_of(backend), tokens, types, merges=merges)
    if model["dropout"] or not any(_SPACE in token for token in model["vocab"]):
        raise _unknown("BPE with bytes that is not SentencePiece's")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    # No union of neighbors makes the others: single characters, bytes and special tokens.
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    prefix = (tokenizer.tokenize("a") or [""])[0].startswith(_SPACE)
    return Vocabulary("llama", "default", tokens, types, scores=scores, space_prefix=prefix)


# Tokens that mark structure though their tokenizer does not call them special, as Gemma's pad; and those of a byte.
_SPECIAL = re.compile(r"<pad>|<mask>|\[@BOS@\]|<2mass>|<\|(.*\|)?>|<unused.*>", re.DOTALL)
_BYTE = re.compile(r"<0x..>", re.DOTALL)


def _tokens(
    tokenizer: PreTrainedTokenizerFast, vocabulary: dict[str, int], size: int, *, bytes_as_tokens: bool
) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in vocabulary.items()}
    tokens, types = [], []
    added = tokenizer.added_tokens_decoder
    for number in range(size):
        if number in added:
            entry = added[number]
            special = entry.special or _SPECIAL.fullmatch(entry.content)
            tokens.append(entry.content if special else entry.content.replace(_SPACE, " "))
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif number in by_id:
            tokens.append(by_id[number])
            is_byte = bytes_as_tokens and _BYTE.fullmatch(by_id[number])
            types.append(TokenType.BYTE if is_byte else TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
    if bytes_as_tokens and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _unknown(kind: str) -> UserError:
    hint = f"known are byte-level BPE and SentencePiece's BPE; otherwise {OWN_CONVERTER}"
    what = f"a tokenizer of kind '{kind}' is not exported to GGUF here"
    return UserError(what, where="tokenizer.json", hint=hint)
