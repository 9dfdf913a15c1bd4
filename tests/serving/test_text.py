"""Tests of incremental detokenization: valid chunks, stop strings across tokens, byte-level and fallback tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from deltaw.decoding.generation import IncrementalDetokenizer
from deltaw.decoding.sequences import OutputText, validate_stops
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer

TEXTS = ["a plain text of plain words, and more of them", "Ünïcode — 漢字 🙂🙃 end", "aa ab aab \n\n  two  spaces"]


def merged_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges, as in GPT-2, Llama 3 and Qwen. Some merges end within a character."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<|end|>"]}
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, **options)
    backend.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a marker for the preceding space, and byte fallback, as in Llama 2 and Gemma."""
    words = ["▁", "▁a", "▁plain", "▁text", "a", "b", "e", "n", "d", "▁end", ".", "▁aa"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer(), "merged": merged_tokenizer(), "fallback": fallback_tokenizer()}
BYTE_LEVEL = ["bytes", "merged"]


def decode_all(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def text_before_stop(text: str, stop: list[str]) -> str:
    """Return the text before its first stop string, searching character by character."""
    for length in range(len(text) + 1):
        if matches := [candidate for candidate in stop if text[:length].endswith(candidate)]:
            return text[: length - max(map(len, matches))]
    return text


def emit_chunks(tokenizer: PreTrainedTokenizerFast, tokens: list[int], stop: list[str]) -> tuple[list[str], bool]:
    """Return the text emitted for each token and at the end, and whether a stop string ended it."""
    text = OutputText(tokenizer, stop)
    return [*map(text.add, tokens), text.end()], text.stopped


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_chunks_of_random_tokens_join_to_decoded_text(kind: str, data: st.DataObject):
    """Random tokens are mostly invalid UTF-8, which must decode as in the tokenizer."""
    tokenizer = TOKENIZERS[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=120))
    text = IncrementalDetokenizer(tokenizer)
    assert "".join([*map(text.add, tokens), text.end()]) == decode_all(tokenizer, tokens)


def tokens_of(kind: str, text: str) -> list[int]:
    """Return a text's tokens. The fallback tokenizer cannot encode, so its characters and bytes are looked up."""
    if kind != "fallback":
        return list(TOKENIZERS[kind](text, add_special_tokens=False)["input_ids"])
    vocabulary = TOKENIZERS[kind].get_vocab()
    parts = ([c] if c in vocabulary else [f"<0x{b:02X}>" for b in c.encode()] for c in text.replace(" ", "▁"))
    return [vocabulary[part_token] for part in parts for part_token in part]


# A small alphabet, so that complete and partial stop strings are frequent. It includes characters of 2, 3 and 4 bytes.
CHARACTERS = st.text(st.sampled_from("ab .\néß漢字🙂🙃"), max_size=30)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(
    texts=st.lists(CHARACTERS, min_size=1, max_size=5),
    specials=st.integers(0, 3),
    stop=st.lists(st.text(st.sampled_from("ab .\né漢🙂"), min_size=1, max_size=4), max_size=3),
)
@settings(deadline=None, max_examples=100)
def test_chunks_end_before_first_stop_string(kind, texts, specials, stop):
    # Special tokens follow the first texts.
    tokens = [token for n, text in enumerate(texts) for token in tokens_of(kind, text) + [0] * (n < specials)]
    text = decode_all(TOKENIZERS[kind], tokens)
    chunks, stopped = emit_chunks(TOKENIZERS[kind], tokens, stop)
    expected = text_before_stop(text, stop)
    assert ("".join(chunks), stopped) == (expected, expected != text)
    assert not any(end in expected for end in stop)
    # Every chunk is valid text without partial characters or replacement characters.
    assert "\ufffd" not in expected and all(piece.encode() for piece in chunks if piece)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_is_emitted_as_early_as_possible(kind: str):
    text = OutputText(TOKENIZERS[kind], ["aab"])
    output = ""
    for token in tokens_of(kind, "b. é漢🙂 a aa. aab b"):
        output += text.add(token)
        assert not text.stopped or output == "b. é漢🙂 a aa. "
    assert text.stopped
    unstopped = OutputText(TOKENIZERS[kind], ["zz"])
    assert "".join(map(unstopped.add, tokens_of(kind, "b漢🙂"))) == "b漢🙂"  # no text is buffered until the end


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_multibyte_characters_are_emitted_one_by_one(kind: str):
    text = IncrementalDetokenizer(TOKENIZERS[kind])
    characters = "漢🙂é字a" * 60
    chunks = [text.add(token) for token in tokens_of(kind, characters)]
    assert "".join(chunks) == characters and max(map(len, chunks)) <= 4
    assert len(text._buffer) < 40  # the buffer does not grow with the text


@given(st.lists(st.integers(0, 270), max_size=300))
@settings(deadline=None, max_examples=50)
def test_invalid_bytes_do_not_drop_valid_characters(tokens: list[int]):
    """The tokenizer replaces an entire run of bytes if one byte is invalid. Emitted characters are not revoked."""
    tokenizer = TOKENIZERS["fallback"]
    text = IncrementalDetokenizer(tokenizer)
    parts = []
    for token in tokens:
        parts.append(text.add(token))
        assert len(text._buffer) <= 65
    emitted = iter("".join([*parts, text.end()]))
    assert all(c in emitted for c in decode_all(tokenizer, tokens) if c not in "\ufffd ")  # in the same order


def test_invalid_bytes_are_not_buffered_to_the_end():
    tokenizer = TOKENIZERS["bytes"]
    continuation = tokenizer.get_vocab()[pre_tokenizers.ByteLevel().pre_tokenize_str("€")[0][0][1]]
    text = IncrementalDetokenizer(tokenizer)
    output = "".join(text.add(continuation) for _ in range(2000))
    assert len(output) >= 1990 and output + text.end() == "\ufffd" * 2000


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_first_completed_stop_string_ends_text(kind: str):
    tokens = tokens_of(kind, "one two three")
    for stop, expected in (
        (["two", "ne"], "o"),
        (["ne", "two"], "o"),
        (["three", "e t", "ne two"], "on"),
        (["wo", " two", "two t"], "one"),
    ):
        chunks, stopped = emit_chunks(TOKENIZERS[kind], tokens, stop)
        assert ("".join(chunks), stopped) == (expected, True)


def test_partial_stop_strings_are_emitted_on_mismatch():
    for text, stop, expected in (
        ("aaab", "aab", (["", "", "a", "", ""], True)),
        ("aa", "aab", (["", "", "aa"], False)),
        ("a.b.c", ".", (["a", "", "", "", "", ""], True)),  # the stop string ends the text
    ):
        assert emit_chunks(TOKENIZERS["bytes"], tokens_of("bytes", text), [stop]) == expected


@pytest.mark.parametrize("stop", [[""], ["x" * 2000], ["a"] * 17])
def test_invalid_stop_strings_are_rejected(stop: list[str]):
    with pytest.raises(UserError) as error:
        validate_stops(stop)
    assert error.value.location == "stop"
    validate_stops(["a", "\n\n"])


def test_special_tokens_are_omitted():
    a, first, second = tokens_of("bytes", "aé")
    assert "".join(emit_chunks(TOKENIZERS["bytes"], [1, a, 2, first, 0, second], [])[0]) == "aé"
