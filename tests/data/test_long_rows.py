"""Long rows are split, and every label is a label in exactly one piece."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.data.formats import Pair, Record, Text
from deltaw.data.long_rows import split_long, split_tokens
from deltaw.data.templates import Encoded, Encoder
from tests.data.chat_templates import tokenizer_of
from tests.data.test_masks import exchange, marked


def split(record: Record, limit: int, family: str = "chatml", **settings: object) -> list[str]:
    """Return the pieces as text, with « and » around labels."""
    tokenizer = tokenizer_of(family)
    encoder = Encoder(tokenizer, **settings)  # type: ignore[arg-type]
    (encoded_row,) = encoder.encode([record], ["row 1"])
    pieces = split_long(record, encoded_row, encoder, limit, "row 1")
    assert all(len(piece.tokens) <= limit for piece in pieces)
    return [marked(tokenizer, piece) for piece in pieces]


def labels_of(texts: list[str]) -> list[str]:
    return [part.partition("»")[0] for text in texts for part in text.split("«")[1:]]


def test_texts_and_pairs_are_split_into_pieces_with_context() -> None:
    assert split(Text("abcdefghij"), 4, "base") == ["a«bcd»", "d«efg»", "g«hij»", "j«<|endoftext|>»"]
    # Each piece starts with BOS if the text does.
    pieces = split(Text("abcdefghij"), 6, "base-bos")
    assert pieces[0] == "<s>« abcd»" and all(piece.startswith("<s>") for piece in pieces)
    assert "".join(labels_of(pieces)) == " abcdefghij</s>"
    # The first piece of a pair contains the prompt. A prompt above the limit is truncated from the left.
    pieces = split(Pair("Say it: ", "abcdefghijklmnop"), 12, "base")
    assert pieces[0] == "Say it: «abcd»" and "".join(labels_of(pieces)) == "abcdefghijklmnop<|endoftext|>"
    assert split(Pair("x" * 50, "abc"), 12, "base") == ["xxxxxxxx«abc<|endoftext|>»"]


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 40), st.booleans(), st.lists(st.integers(0, 39), max_size=6))
def test_every_label_occurs_once_after_its_context(limit, length, filled, cuts):
    tokens = list(range(100, 100 + length))
    edges = sorted({cut for cut in cuts if 0 < cut < length})
    spans = list(zip(edges[0::2], edges[1::2], strict=False))
    row = Encoded(tokens, spans, 0, None)
    learned: list[int] = []
    for piece in split_tokens(row, limit, (), maximize_context=filled):
        assert 2 <= len(piece.tokens) <= limit
        # Tokens are consecutive as in the row, so each label has the same context.
        assert piece.tokens == list(range(piece.tokens[0], piece.tokens[0] + len(piece.tokens)))
        assert all(start > 0 for start, _ in piece.spans)
        learned += [token for start, stop in piece.spans for token in piece.tokens[start:stop]]
    assert learned == [token for start, stop in spans for token in tokens[start:stop]]


def test_conversations_split_at_questions_with_the_system_message() -> None:
    turns = (("Capital of Peru?", "Lima."), ("And of Chile?", "Santiago."), ("Of Cuba?", "Havana."))
    prefix = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    pieces = split(exchange(*turns, system="Be brief."), 110)
    assert pieces == [
        prefix + "Capital of Peru?<|im_end|>\n<|im_start|>assistant\n«Lima.<|im_end|>»\n"
        "<|im_start|>user\nAnd of Chile?<|im_end|>\n<|im_start|>assistant\n«Santiago.<|im_end|>»",
        prefix + "Of Cuba?<|im_end|>\n<|im_start|>assistant\n«Havana.<|im_end|>»",
    ]
    assert labels_of(split(exchange(*turns, system="Be brief."), 80)) == [f"{a}<|im_end|>" for _, a in turns]
    assert labels_of(split(exchange(*turns), 60, labels="last")) == ["Havana.<|im_end|>"]


def test_long_turn_is_split_inside_its_answer() -> None:
    long = "The capital of Peru is Lima, and that of Chile is Santiago."
    pieces = split(exchange(("Go on.", "Yes."), ("And?", long), ("Thanks.", "Bye.")), 50)
    first, *inner, last = labels_of(pieces)
    assert (first, "".join(inner), last) == ("Yes.<|im_end|>", long + "<|im_end|>", "Bye.<|im_end|>")
    assert pieces[1].startswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n«The capital")
    # Later pieces start with unlabeled tokens of the answer as context.
    assert all(not piece.startswith("«") for piece in pieces)


@pytest.mark.parametrize("family", ["qwen3", "mistral3", "gemma3", "base"])
def test_labels_are_neither_lost_nor_repeated_with_rewriting_templates(family: str) -> None:
    record = exchange(*((f"Question {n}, please?", f"Answer {n}." * n) for n in range(1, 7)))
    tokenizer = tokenizer_of(family)
    (encoded_examples,) = Encoder(tokenizer).encode([record], ["row 1"])
    expected = "".join(labels_of([marked(tokenizer, example) for example in encoded_examples]))
    for limit in (70, 100, 150, 400):
        if max(len(example.tokens) for example in encoded_examples) > limit:
            assert "".join(labels_of(split(record, limit, family))) == expected
