"""Tests of prompts as tokens, and of tokens as bytes."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data.prompt_tokens import encode_prompt
from deltaw.errors import UserError
from deltaw.inference.prompting import Prompting
from deltaw.settings.data import DataSettings
from tests.byte_models import byte_tokenizer
from tests.serving.http.concurrency import run_in_threads
from tests.serving.test_text import fallback_tokenizer

pytest.importorskip("fastapi", reason="the server requires FastAPI (extra 'dev')")

from deltaw.serving.http.prompts import TokenizerPrompts, bytes_of_token, far_exceeds

HELLO: list[dict[str, object]] = [{"role": "user", "content": "Grüße"}]
TOOL: dict[str, object] = {"type": "function", "function": {"name": "weather", "parameters": {}}}
PLAIN = DataSettings(train="x", template="plain")


def with_template(template: str) -> TokenizerPrompts:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return TokenizerPrompts(tokenizer)


@pytest.mark.parametrize("data", [None, PLAIN, DataSettings(train="x")])
def test_concurrently_rendered_prompts_match_training(data):
    tokenizer = byte_tokenizer()
    prompts = TokenizerPrompts(tokenizer, data)
    expected = encode_prompt(HELLO, data or "auto", tokenizer).tolist()
    np.testing.assert_array_equal(prompts.text("abc"), encode_prompt("abc", "plain", tokenizer))
    results = run_in_threads(lambda _: [prompts.chat(HELLO, []).tolist() for _ in range(20)], range(4))
    assert results == [[expected] * 20] * 4


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("data", [PLAIN, DataSettings(train="x")])
def test_added_system_prompt_matches_training(data, joined):
    tokenizer = byte_tokenizer()
    prompting = Prompting("Be brief.", joined=joined)
    expected = prompting.prompt([{"role": "system", "content": "Be brief."}, *HELLO], data, tokenizer)
    np.testing.assert_array_equal(TokenizerPrompts(tokenizer, data, prompting=prompting).chat(HELLO, []), expected)


def test_far_exceeds_counts_tokens_not_characters():
    assert far_exceeds("x" * 800, 100, list) and not far_exceeds("x" * 800, 100, lambda text: text[::2])


def test_turns_may_have_any_order_supported_by_template():
    """Unlike rows, chats may contain consecutive user messages."""
    turns: list[dict[str, object]] = [{"role": r, "content": "x"} for r in ("assistant", "user", "user", "system")]
    assert len(TokenizerPrompts(byte_tokenizer()).chat(turns, []))


def test_tools_require_template_support():
    for data in (None, PLAIN):
        with pytest.raises(UserError, match="does not support tools"):
            TokenizerPrompts(byte_tokenizer(), data).chat(HELLO, [TOOL])
    tokens = with_template("{{ tools | tojson }}" + str(byte_tokenizer().chat_template)).chat(HELLO, [TOOL])
    assert "weather" in byte_tokenizer().decode(tokens)


def test_template_error_contains_its_message():
    with pytest.raises(UserError, match="only one turn"):
        with_template("{{ raise_exception('only one turn') }}").chat(HELLO, [])


def test_token_bytes_join_to_text():
    prompts = TokenizerPrompts(byte_tokenizer())
    text = "aé 東🙂\n\t"
    assert b"".join(prompts.token_bytes(int(t)) for t in prompts.text(text)) == text.encode()
    assert prompts.token_bytes(1) == b"<|im_start|>"
    assert {prompts.token_bytes(t) for t in range(3, 259)} == {bytes([b]) for b in range(256)}


def test_token_bytes_with_byte_fallback():
    tokenizer = fallback_tokenizer()
    expected = {"<0xC3>": b"\xc3", "<0xA9>": b"\xa9", "▁a": b" a", "b": b"b"}
    assert {t: bytes_of_token(tokenizer, tokenizer.get_vocab()[t]) for t in expected} == expected
    assert bytes_of_token(tokenizer, 7777) == b""
