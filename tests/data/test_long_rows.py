"""Rows that are too long are divided, and every label is a label in exactly one piece."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.chunk import split_long, windows
from deltaw.data.formats import Pair, Record, Text
from deltaw.data.templates import Encoded, Encoder
from tests.data.chat_templates import tokenizer_of
from tests.data.test_masks import exchange, marked


def split(record: Record, limit: int, family: str = "chatml", **settings: object) -> list[str]:
    """The pieces as text, with « and » around labels."""
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, **settings)  # type: ignore[arg-type]
    (whole,) = encoder.encode([record], ["row 1"])
    pieces = split_long(record, whole, encoder, limit, "row 1")
    assert all(len(piece.tokens) <= limit for piece in pieces)
    return [marked(tokenizer, piece) for piece in pieces]


def labels_of(texts: list[str]) -> list[str]:
    return [part.partition("»")[0] for text in texts for part in text.split("«")[1:]]


def test_texts_and_plain_pairs_are_divided_into_consecutive_pieces_with_context() -> None:
    assert split(Text("abcdefghij"), 4, "base") == ["a«bcd»", "d«efg»", "g«hij»", "j«<|endoftext|>»"]
    # Each piece begins with BOS where the text does.
    pieces = split(Text("abcdefghij"), 6, "base-bos")
    assert pieces[0] == "<s>« abcd»" and all(piece.startswith("<s>") for piece in pieces)
    assert "".join(labels_of(pieces)) == " abcdefghij</s>"
    # A pair keeps its prompt in the first piece; one longer than the limit loses its beginning and no label.
    pieces = split(Pair("Say it: ", "abcdefghijklmnop"), 12, "base")
    assert pieces[0] == "Say it: «abcd»" and "".join(labels_of(pieces)) == "abcdefghijklmnop<|endoftext|>"
    assert split(Pair("x" * 50, "abc"), 12, "base") == ["xxxxxxxx«abc<|endoftext|>»"]


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 40), st.booleans(), st.lists(st.integers(0, 39), max_size=6))
def test_every_label_is_in_one_piece_after_the_tokens_that_precede_it(limit, length, filled, cuts):
    tokens = list(range(100, 100 + length))
    edges = sorted({cut for cut in cuts if 0 < cut < length})
    spans = list(zip(edges[0::2], edges[1::2], strict=False))
    row = Encoded(tokens, spans, 0, None)
    learned: list[int] = []
    for piece in windows(row, limit, (), filled=filled):
        assert 2 <= len(piece.tokens) <= limit
        # Tokens follow one another as in the row, so that each label follows what it follows there.
        assert piece.tokens == list(range(piece.tokens[0], piece.tokens[0] + len(piece.tokens)))
        assert all(start > 0 for start, _ in piece.spans)
        learned += [token for start, stop in piece.spans for token in piece.tokens[start:stop]]
    assert learned == [token for start, stop in spans for token in tokens[start:stop]]


def test_conversations_are_divided_before_a_question_and_keep_the_system_message() -> None:
    turns = (("Capital of Peru?", "Lima."), ("And of Chile?", "Santiago."), ("Of Cuba?", "Havana."))
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    pieces = split(exchange(*turns, system="Be brief."), 110)
    assert pieces == [
        head + "Capital of Peru?<|im_end|>\n<|im_start|>assistant\n«Lima.<|im_end|>»\n"
        "<|im_start|>user\nAnd of Chile?<|im_end|>\n<|im_start|>assistant\n«Santiago.<|im_end|>»",
        head + "Of Cuba?<|im_end|>\n<|im_start|>assistant\n«Havana.<|im_end|>»",
    ]
    assert labels_of(split(exchange(*turns, system="Be brief."), 80)) == [f"{a}<|im_end|>" for _, a in turns]
    assert labels_of(split(exchange(*turns), 60, labels="last")) == ["Havana.<|im_end|>"]


def test_a_turn_that_is_too_long_alone_is_divided_inside_its_answer() -> None:
    long = "The capital of Peru is Lima, and that of Chile is Santiago."
    pieces = split(exchange(("Go on.", "Yes."), ("And?", long), ("Thanks.", "Bye.")), 50)
    first, *inner, last = labels_of(pieces)
    assert (first, "".join(inner), last) == ("Yes.<|im_end|>", long + "<|im_end|>", "Bye.<|im_end|>")
    assert pieces[1].startswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n«The capital")
    # Later pieces have some of the answer before what they learn.
    assert all(not piece.startswith("«") for piece in pieces)


@pytest.mark.parametrize("family", ["qwen3", "mistral3", "gemma3", "base"])
def test_no_label_is_lost_or_learned_twice_whatever_the_template_rewrites(family: str) -> None:
    record = exchange(*((f"Question {n}, please?", f"Answer {n}." * n) for n in range(1, 7)))
    tokenizer = tokenizer_of(family)
    (whole,) = Encoder(tokenizer).encode([record], ["row 1"])
    expected = "".join(labels_of([marked(tokenizer, example) for example in whole]))
    for limit in (70, 100, 150, 400):
        if max(len(example.tokens) for example in whole) > limit:
            assert "".join(labels_of(split(record, limit, family))) == expected
