"""Tokens as text for a person: what is trained on apart from the rest, special tokens by name."""

from __future__ import annotations

import pytest

from deltaw.data.pieces import pieces
from deltaw.data.templates import Encoder
from tests.data.chat_templates import FAMILIES, tokenizer_of
from tests.data.test_masks import ANSWERS, marked, talk


def test_special_tokens_are_pieces_of_their_own() -> None:
    tokenizer = tokenizer_of("chatml")
    (encoded,) = Encoder(tokenizer).encode([talk("é Lima.")], ["row 1"])[0]
    is_label = [False] * len(encoded.tokens)
    for start, stop in encoded.spans:
        is_label[start:stop] = [True] * (stop - start)
    found = pieces(encoded.tokens, is_label, tokenizer)
    assert [(piece.text, piece.label, piece.special) for piece in found] == [
        ("<|im_start|>", False, True),
        ("user\nCapital of Peru?", False, False),
        ("<|im_end|>", False, True),
        ("\n", False, False),
        ("<|im_start|>", False, True),
        ("assistant\n", False, False),
        ("é Lima.", True, False),
        ("<|im_end|>", True, True),
    ]
    assert sum(piece.tokens for piece in found) == len(encoded.tokens)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek-r1"])
def test_the_texts_of_all_pieces_are_the_whole_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for encoded in Encoder(tokenizer).encode([talk(*ANSWERS)], ["row 1"])[0]:
        is_label = [any(a <= n < b for a, b in encoded.spans) for n in range(len(encoded.tokens))]
        shown, labeled = "", False
        for piece in pieces(encoded.tokens, is_label, tokenizer):
            if piece.label is not labeled:
                shown, labeled = shown + ("«" if piece.label else "»"), piece.label
            shown += piece.text
        assert shown + ("»" if labeled else "") == marked(tokenizer, encoded)


def test_no_tokens_are_no_pieces() -> None:
    assert pieces([], [], tokenizer_of("base")) == []
