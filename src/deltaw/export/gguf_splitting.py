"""Which of llama.cpp's ways to split text a byte-level tokenizer has (``tokenizer.ggml.pre``).

A GGUF file names the splitting instead of holding it. A tokenizer's own rules are recognized by what they
do: a probe text is split by them and by the rules behind each name, and the pieces are compared. So the
vocabulary does not matter, and neither does how a rule is written down.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from deltaw.errors import UserError

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


def _by(expression: str) -> PreTokenizer:
    """Split by one expression, without GPT-2's own."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _like_gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _like_gpt2()])


def _tekken() -> PreTokenizer:
    return _by("|".join((*_CASED, r"\p{N}", _MARKS_SLASH, _SPACES)))


def _gpt_4o() -> PreTokenizer:
    cased = [f"{one}{_CONTRACTIONS}?" for one in _CASED]
    return _by("|".join((*cased, r"\p{N}{1,3}", _MARKS_SLASH, _SPACES)))


# llama.cpp's name, and the rules behind it. The first that fits is taken.
_KNOWN: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _like_gpt2,
    "smollm": _single_digits,
    "qwen2": lambda: _by("|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _MARKS, _SPACES))),
    "llama-bpe": lambda: _by("|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _MARKS, _SPACES))),
    "tekken": _tekken,
    "gpt-4o": _gpt_4o,
}


def splitting_of(backend: Tokenizer) -> str:
    """llama.cpp's name of the splitting that ``backend`` has.

    Raises:
        UserError: none of those that are known here splits the probe text as it does.
    """
    own = backend.pre_tokenizer
    if own is not None:
        pieces = _pieces(own)
        for name, make in _KNOWN.items():
            if _pieces(make()) == pieces:
                return name
    raise UserError(
        "the tokenizer splits text in a way that has no known name in llama.cpp",
        where="tokenizer.json: pre_tokenizer",
        hint=f"known are {', '.join(_KNOWN)}; where the base model is published as a .gguf file, name that "
        "file with --model, whose own metadata is then used",
    )


def _pieces(splitter: PreTokenizer) -> list[str]:
    return [piece for piece, _ in splitter.pre_tokenize_str(_PROBE)]
