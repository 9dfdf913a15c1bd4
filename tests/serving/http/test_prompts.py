"""Prompts of chats and texts as tokens, and tokens as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from deltaw.data import DataSettings, encode_prompt
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer
from tests.serving.http.waiting import at_once

pytest.importorskip("fastapi", reason="the server needs FastAPI: it is in the extra 'dev'")

from deltaw.serving.http.preparing import TokenizerPrompts, bytes_of_token, surely_longer

HELLO: list[dict[str, object]] = [{"role": "user", "content": "Grüße"}]
TOOL: dict[str, object] = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize("data", [None, DataSettings(train="x", template="plain"), DataSettings(train="x")])
def test_prompts_are_rendered_as_in_training(data: DataSettings | None) -> None:
    tokenizer = byte_tokenizer()
    prompts = TokenizerPrompts(tokenizer, data)
    expected = encode_prompt(HELLO, data or "auto", tokenizer)
    np.testing.assert_array_equal(prompts.chat(HELLO, []), expected)
    np.testing.assert_array_equal(prompts.text("abc"), encode_prompt("abc", "plain", tokenizer))


def test_a_text_far_too_long_is_known_from_its_beginning() -> None:
    read = 0

    def tokens(text: str) -> str:
        nonlocal read
        read += len(text)
        return text[::2]  # two characters a token

    assert surely_longer("x" * 1_000_000, 100, tokens)
    assert read == 1200
    assert not surely_longer("x" * 400, 100, tokens) and read == 1200  # so little is not looked at
    assert not surely_longer("x" * 800, 100, tokens)


def test_turns_may_come_in_any_order_that_the_template_takes() -> None:
    """Unlike rows, chats of clients have several messages of the user in a row."""
    prompts = TokenizerPrompts(byte_tokenizer())
    turns: list[dict[str, object]] = [{"role": r, "content": "x"} for r in ("assistant", "user", "user", "system")]
    assert len(prompts.chat(turns, []))


def test_tools_need_a_template_that_knows_them() -> None:
    for data in (None, DataSettings(train="x", template="plain")):
        with pytest.raises(UserError, match="no place for tools"):
            TokenizerPrompts(byte_tokenizer(), data).chat(HELLO, [TOOL])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + str(tokenizer.chat_template)
    tokens = TokenizerPrompts(tokenizer).chat(HELLO, [TOOL])
    assert "weather" in tokenizer.decode(tokens)


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(UserError, match="only one turn"):
        TokenizerPrompts(tokenizer).chat(HELLO, [])


def test_the_bytes_of_tokens_are_the_text() -> None:
    tokenizer = byte_tokenizer()
    prompts = TokenizerPrompts(tokenizer)
    text = "aé 東🙂\n\t"
    assert b"".join(prompts.token_bytes(int(t)) for t in prompts.text(text)) == text.encode()
    assert prompts.token_bytes(1) == b"<|im_start|>"
    assert {prompts.token_bytes(t) for t in range(3, 259)} == {bytes([b]) for b in range(256)}


def test_the_bytes_of_tokens_with_byte_fallback() -> None:
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "\u2581a": 3, "b": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert [bytes_of_token(tokenizer, t) for t in (1, 2, 3, 4)] == [b"\xc3", b"\xa9", b" a", b"b"]
    assert bytes_of_token(tokenizer, 77) == b""


def test_several_threads_may_ask_at_once() -> None:
    prompts = TokenizerPrompts(byte_tokenizer())
    expected = prompts.chat(HELLO, [])
    right: list[bool] = []

    def ask(_: int) -> None:
        right.extend(np.array_equal(prompts.chat(HELLO, []), expected) for _ in range(50))

    at_once(ask, range(4))
    assert len(right) == 200 and all(right)
