"""Tokens as readable text, with labels separated and special tokens by name."""

from __future__ import annotations

import itertools

import pytest
from transformers import PreTrainedTokenizerBase

from deltaw.data.example import TokenSpan, token_spans
from deltaw.data.templates import Encoded, Encoder
from tests.data.chat_templates import FAMILIES, tokenizer_of
from tests.data.test_masks import ANSWERS, QUESTIONS, marked, talk


def spans_of(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[TokenSpan]:
    is_label = [any(start <= n < stop for start, stop in encoded.spans) for n in range(len(encoded.tokens))]
    return token_spans(encoded.tokens, is_label, tokenizer)


def test_special_tokens_are_separate_spans() -> None:
    tokenizer = tokenizer_of("chatml")
    (encoded,) = Encoder(tokenizer).encode([talk("é Lima.")], ["row 1"])[0]
    spans = spans_of(tokenizer, encoded)
    plain, special = ([piece.text for piece in spans if piece.special is kind] for kind in (False, True))
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    assert plain == ["user\n" + QUESTIONS[0], "\n", "assistant\n", "é Lima."]
    assert [piece.text for piece in spans if piece.label] == ["é Lima.", "<|im_end|>"]
    assert sum(piece.tokens for piece in spans) == len(encoded.tokens)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek-r1"])
def test_span_texts_concatenate_to_the_full_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for encoded in Encoder(tokenizer).encode([talk(*ANSWERS)], ["row 1"])[0]:
        groups = itertools.groupby(spans_of(tokenizer, encoded), lambda piece: piece.label)
        texts = [("«{}»" if label else "{}").format("".join(piece.text for piece in group)) for label, group in groups]
        assert "".join(texts) == marked(tokenizer, encoded)


def test_no_tokens_return_no_spans() -> None:
    assert token_spans([], [], tokenizer_of("base")) == []
