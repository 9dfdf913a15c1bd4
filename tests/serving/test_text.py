"""Tokens to text: valid pieces, stop strings across token borders, tokenizers of bytes and of words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.runtime.generation import TextPieces
from deltaw.serving.running import WrittenText, validate_stops
from tests.byte_models import byte_tokenizer

TEXTS = ["a plain text of plain words, and more of them", "Ünïcode — 漢字 🙂🙃 end", "aa ab aab \n\n  two  spaces"]


def merged_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as GPT-2, Llama 3 and Qwen have it; some merges end within characters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    how = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<|end|>"]}
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, **how)
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a mark for the space before them, and bytes for the rest, as Llama 2 and Gemma have it."""
    words = ["▁", "▁a", "▁plain", "▁text", "a", "b", "e", "n", "d", "▁end", ".", "▁aa"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer(), "merged": merged_tokenizer(), "fallback": fallback_tokenizer()}
BYTE_LEVEL = ["bytes", "merged"]


def whole(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def cut(text: str, stop: list[str]) -> str:
    """The text before its first stop string, the slow, obvious way: a character at a time."""
    for length in range(len(text) + 1):
        if ends := [one for one in stop if text[:length].endswith(one)]:
            return text[: length - max(map(len, ends))]
    return text


def pieces(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str]) -> tuple[list[str], bool]:
    """What is given out with each token and at the end, and whether a stop string ended it."""
    text = WrittenText(tokenizer, stop)
    return [*map(text.add, tokens), text.end()], text.stopped


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_pieces_of_any_tokens_are_the_whole_text(kind: str, data: st.DataObject):
    """Tokens drawn at random are mostly no UTF-8 at all; the pieces still are what the tokenizer says."""
    tokenizer = TOKENIZERS[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=120))
    text = TextPieces(tokenizer)
    assert "".join([*map(text.add, tokens), text.end()]) == whole(tokenizer, tokens)


def tokens_of(kind: str, text: str) -> list[int]:
    """A text's tokens; by the fallback tokenizer its bytes and some words of the vocabulary."""
    if kind != "fallback":
        return list(TOKENIZERS[kind](text, add_special_tokens=False)["input_ids"])
    known = TOKENIZERS[kind].get_vocab()
    parts = ([c] if c in known else [f"<0x{b:02X}>" for b in c.encode()] for c in text.replace(" ", "▁"))
    return [known[one] for part in parts for one in part]


# Few characters, so that stop strings come, begin and break off; among them characters of 2, 3 and 4 bytes.
CHARACTERS = st.text(st.sampled_from("ab .\néß漢字🙂🙃"), max_size=30)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    texts=st.lists(CHARACTERS, min_size=1, max_size=5),
    specials=st.integers(0, 3),
    stop=st.lists(st.text(st.sampled_from("ab .\né漢🙂"), min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None, max_examples=100)
def test_pieces_are_the_text_up_to_its_first_stop_string(kind, texts, specials, stop):
    # Special tokens stand behind the first texts.
    tokens = [token for n, text in enumerate(texts) for token in tokens_of(kind, text) + [0] * (n < specials)]
    text = whole(TOKENIZERS[kind], tokens)
    given_out, stopped = pieces(TOKENIZERS[kind], tokens, stop)
    expected = cut(text, stop)
    assert ("".join(given_out), stopped) == (expected, expected != text)
    assert not any(end in expected for end in stop)
    # Every piece is text of its own: no half of a character, and no mark for one, as the text has none.
    assert "\ufffd" not in expected and all(piece.encode() for piece in given_out if piece)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_comes_as_soon_as_it_is_certain(kind: str):
    text, shown = WrittenText(TOKENIZERS[kind], ["aab"]), ""
    for token in tokens_of(kind, "b. é漢🙂 a aa. aab b"):
        shown += text.add(token)
        assert not text.stopped or shown == "b. é漢🙂 a aa. "
    assert text.stopped
    certain = WrittenText(TOKENIZERS[kind], ["zz"])
    assert "".join(map(certain.add, tokens_of(kind, "b漢🙂"))) == "b漢🙂"  # nothing waits for the end


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_long_runs_of_characters_of_many_bytes_are_given_out_one_by_one(kind: str):
    text, characters = TextPieces(TOKENIZERS[kind]), "漢🙂é字a" * 60
    given_out = [text.add(token) for token in tokens_of(kind, characters)]
    assert "".join(given_out) == characters and max(map(len, given_out)) <= 4
    assert len(text._held) < 40  # what is decoded with each token does not grow with the text


@given(st.lists(st.integers(0, 270), max_size=300))
@settings(deadline=None, max_examples=50)
def test_bytes_that_are_no_text_lose_no_character_and_end(tokens: list[int]):
    """The tokenizer takes back whole runs of bytes when one byte is wrong; what was given out stays."""
    tokenizer = TOKENIZERS["fallback"]
    text = TextPieces(tokenizer)
    parts = []
    for token in tokens:
        parts.append(text.add(token))
        assert len(text._held) <= 65
    found = iter("".join([*parts, text.end()]))
    assert all(c in found for c in whole(tokenizer, tokens) if c not in "\ufffd ")  # in their order


def test_garbage_is_not_kept_to_the_end():
    tokenizer = TOKENIZERS["bytes"]
    continuation = tokenizer.get_vocab()[pre_tokenizers.ByteLevel().pre_tokenize_str("€")[0][0][1]]
    text = TextPieces(tokenizer)
    given_out = "".join(text.add(continuation) for _ in range(2000))
    assert len(given_out) >= 1990 and given_out + text.end() == "\ufffd" * 2000


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_stop_string_that_is_complete_first_ends_the_text_whichever_it_is(kind: str):
    tokens = tokens_of(kind, "one two three")
    for stop, expected in (
        (["two", "ne"], "o"),
        (["ne", "two"], "o"),
        (["three", "e t", "ne two"], "on"),
        (["wo", " two", "two t"], "one"),
    ):
        given_out, stopped = pieces(TOKENIZERS[kind], tokens, stop)
        assert ("".join(given_out), stopped) == (expected, True)


def test_beginnings_of_stop_strings_are_given_out_when_they_end_otherwise():
    for text, stop, expected in (
        ("aaab", "aab", (["", "", "a", "", ""], True)),
        ("aa", "aab", (["", "", "aa"], False)),
        ("a.b.c", ".", (["a", "", "", "", "", ""], True)),  # nothing comes after it
    ):
        assert pieces(TOKENIZERS["bytes"], tokens_of("bytes", text), [stop]) == expected


@pytest.mark.parametrize("stop", [[""], ["x" * 2000], ["a"] * 17])
def test_stop_strings_out_of_bounds_are_refused(stop: list[str]):
    with pytest.raises(UserError) as error:
        validate_stops(stop)
    assert error.value.where == "stop"
    validate_stops(["a", "\n\n"])


def test_special_tokens_are_left_out():
    a, first, second = tokens_of("bytes", "aé")
    assert "".join(pieces(TOKENIZERS["bytes"], [1, a, 2, first, 0, second], [])[0]) == "aé"
