"""Tokens as text for a person: what is trained on apart from the rest, special tokens by name."""

from __future__ import annotations

import itertools

import pytest
from transformers import PreTrainedTokenizerBase

from deltaw.data.pieces import Piece, pieces
from deltaw.data.templates import Encoded, Encoder
from tests.data.chat_templates import FAMILIES, tokenizer_of
from tests.data.test_masks import ANSWERS, QUESTIONS, marked, talk


def pieces_of(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[Piece]:
    is_label = [any(start <= n < stop for start, stop in encoded.spans) for n in range(len(encoded.tokens))]
    return pieces(encoded.tokens, is_label, tokenizer)


def test_special_tokens_are_pieces_of_their_own() -> None:
    tokenizer = tokenizer_of("chatml")
    (encoded,) = Encoder(tokenizer).encode([talk("é Lima.")], ["row 1"])[0]
    found = pieces_of(tokenizer, encoded)
    plain, special = ([piece.text for piece in found if piece.special is kind] for kind in (False, True))
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    assert plain == ["user\n" + QUESTIONS[0], "\n", "assistant\n", "é Lima."]
    assert [piece.text for piece in found if piece.label] == ["é Lima.", "<|im_end|>"]
    assert sum(piece.tokens for piece in found) == len(encoded.tokens)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deepseek-r1"])
def test_the_texts_of_all_pieces_are_the_whole_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for encoded in Encoder(tokenizer).encode([talk(*ANSWERS)], ["row 1"])[0]:
        groups = itertools.groupby(pieces_of(tokenizer, encoded), lambda piece: piece.label)
        texts = [("«{}»" if label else "{}").format("".join(piece.text for piece in group)) for label, group in groups]
        assert "".join(texts) == marked(tokenizer, encoded)


def test_no_tokens_are_no_pieces() -> None:
    assert pieces([], [], tokenizer_of("base")) == []
