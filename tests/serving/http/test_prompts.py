"""Prompts of chats and texts as tokens, and tokens as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data import DataSettings, encode_prompt
from deltaw.errors import UserError
from tests.byte_models import byte_tokenizer
from tests.serving.http.waiting import at_once
from tests.serving.test_text import fallback_tokenizer

pytest.importorskip("fastapi", reason="the server needs FastAPI: it is in the extra 'dev'")

from deltaw.serving.http.preparing import TokenizerPrompts, bytes_of_token, surely_longer

HELLO: list[dict[str, object]] = [{"role": "user", "content": "Grüße"}]
TOOL: dict[str, object] = {"type": "function", "function": {"name": "weather", "parameters": {}}}
PLAIN = DataSettings(train="x", template="plain")


def with_template(template: str) -> TokenizerPrompts:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return TokenizerPrompts(tokenizer)


@pytest.mark.parametrize("data", [None, PLAIN, DataSettings(train="x")])
def test_prompts_are_rendered_as_in_training_by_several_threads_too(data):
    tokenizer = byte_tokenizer()
    prompts = TokenizerPrompts(tokenizer, data)
    expected = encode_prompt(HELLO, data or "auto", tokenizer).tolist()
    np.testing.assert_array_equal(prompts.text("abc"), encode_prompt("abc", "plain", tokenizer))
    found = at_once(lambda _: [prompts.chat(HELLO, []).tolist() for _ in range(20)], range(4))
    assert found == [[expected] * 20] * 4


def test_a_text_is_far_too_long_by_its_tokens_not_its_characters():
    assert surely_longer("x" * 800, 100, list) and not surely_longer("x" * 800, 100, lambda text: text[::2])


def test_turns_may_come_in_any_order_that_the_template_takes():
    """Unlike rows, chats of clients have several messages of the user in a row."""
    turns: list[dict[str, object]] = [{"role": r, "content": "x"} for r in ("assistant", "user", "user", "system")]
    assert len(TokenizerPrompts(byte_tokenizer()).chat(turns, []))


def test_tools_need_a_template_that_knows_them():
    for data in (None, PLAIN):
        with pytest.raises(UserError, match="no place for tools"):
            TokenizerPrompts(byte_tokenizer(), data).chat(HELLO, [TOOL])
    tokens = with_template("{{ tools | tojson }}" + str(byte_tokenizer().chat_template)).chat(HELLO, [TOOL])
    assert "weather" in byte_tokenizer().decode(tokens)


def test_a_template_that_refuses_says_why():
    with pytest.raises(UserError, match="only one turn"):
        with_template("{{ raise_exception('only one turn') }}").chat(HELLO, [])


def test_the_bytes_of_tokens_are_the_text():
    prompts = TokenizerPrompts(byte_tokenizer())
    text = "aé 東🙂\n\t"
    assert b"".join(prompts.token_bytes(int(t)) for t in prompts.text(text)) == text.encode()
    assert prompts.token_bytes(1) == b"<|im_start|>"
    assert {prompts.token_bytes(t) for t in range(3, 259)} == {bytes([b]) for b in range(256)}


def test_the_bytes_of_tokens_with_byte_fallback():
    tokenizer = fallback_tokenizer()
    expected = {"<0xC3>": b"\xc3", "<0xA9>": b"\xa9", "▁a": b" a", "b": b"b"}
    assert {t: bytes_of_token(tokenizer, tokenizer.get_vocab()[t]) for t in expected} == expected
    assert bytes_of_token(tokenizer, 7777) == b""
