"""Tests of hostile bodies: each is rejected with the right status and field, and the server is unaffected."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

import pytest

from deltaw.decoding.request import BusyError, UnsupportedError
from deltaw.serving.http.prompts import TokenizerPrompts
from deltaw.serving.http.settings import Limits
from tests.serving.http.api_requests import CHAT, COMPLETIONS, GOOD, JSON, SLOW, chat_body, expect_error
from tests.serving.http.concurrency import wait_until

FUNCTION = {"type": "function", "function": {"name": "f"}}
# Invalid values of a field, which the error must name.
INVALID_VALUES: dict[str, list[Any]] = {"temprature": [1], "temperature": ["1", True, 2.1, [1]], "top_p": [0]}
INVALID_VALUES |= {"seed": [1.5]}
INVALID_VALUES |= {"n": [0, 1.5, 10**30, 17], "max_tokens": [0, -1, 5000], "stop": ["", [""], ["a"] * 17, {"a": 1}]}
INVALID_VALUES |= {
    "logit_bias": [{"x": 1}, {"-1": 1}, {"1": 101}],
    "logprobs": [2],
    "stream": ["yes"],
    "model": ["", None, 5],
}
INVALID_VALUES |= {"guided_json": ["not JSON", {"a": "x" * 70_000}], "functions": [[]], "store": [True]}
INVALID_VALUES |= {"tools": [[{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}]]}
INVALID_VALUES |= {"service_tier": ["priority"], "reasoning_effort": ["high"], "modalities": [["text", "audio"]]}
INVALID_VALUES |= {"response_format": [{"type": "json_schema"}, {"type": "xml"}]}
TURNS = ({"role": "user"}, {"role": "king", "content": "hi"}, {"role": "user", "content": 1})
INVALID_VALUES |= {"messages": [[], "hi", *([turn] for turn in TURNS)]}
# Invalid combinations of fields, and the field that the error names, or None.
INVALID_COMBINATIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"max_tokens": 1, "max_completion_tokens": 1}, None),
    ({"top_logprobs": 2}, None),
    ({"stream_options": {"include_usage": True}}, None),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, None),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, None),
    ({"guided_regex": "impossible"}, None),
    ({"tool_choice": "required"}, None),
    ({"tools": [FUNCTION]}, "messages"),  # the template does not support tools
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"messages": [{"role": "user", "content": "hi", "weight": 1}]}, "messages.0.weight"),
    ({"messages": [*GOOD["messages"], {"role": "assistant", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
]


def test_invalid_fields_are_rejected_by_name(shared):
    cases = [({field: value}, field) for field, values in INVALID_VALUES.items() for value in values]
    for change, param in [*cases, *INVALID_COMBINATIONS]:
        error = expect_error(shared.post(CHAT, json=GOOD | change), 400)
        assert error["type"] == "invalid_request_error"
        assert param is None or str(error["param"]).startswith(param), change
    error = expect_error(shared.post(CHAT, json=GOOD | {"temprature": 1}), 400)
    assert error["code"] == "unknown_parameter" and "'temperature'" in error["message"]
    error = expect_error(shared.post(CHAT, json={"model": "base"}), 400)
    assert (error["code"], error["param"]) == ("missing_required_parameter", "messages")
    assert shared.is_responsive()


@pytest.mark.parametrize("user", [None, "text"])
def test_fields_without_effect_are_accepted(shared, user):
    harmless = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "audio": None, "user": user}
    assert shared.post(CHAT, json=GOOD | harmless).status_code == 200


def test_invalid_completion_requests_are_rejected(shared):
    prompts = ["", [], [[]], ["a", 1], [1, 2.5], [-1], [10**12], [300], None, ["a"] * 17, "x" * 4096]
    changes: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    changes += [{"prompt": ["a"] * 9, "n": 2}, {"max_tokens": 0}, {"logprobs": 21}, {"echo": "yes"}]
    changes += [{"suffix": "x"}, {"best_of": 2}, {"messages": []}]
    for change in changes:
        expect_error(shared.post(COMPLETIONS, json={"model": "base", "prompt": "a"} | change), 400)
    error = expect_error(shared.post(COMPLETIONS, json={"model": "base", "prompt": "x" * 5000}), 400)
    assert error["code"] == "context_length_exceeded" and "4,096 positions" in error["message"]
    assert shared.is_responsive()


def test_unknown_models_return_404(shared):
    for name in ("nobody", "../../etc/passwd", "/", "a\x00b", "ＢＡＳＥ", "base ", "poet/"):
        error = expect_error(shared.post(CHAT, json=GOOD | {"model": name}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_malformed_bodies_are_rejected(shared):
    start = b'{"model": "base", "messages": [{"role": "user", "content": '
    end = b'"hi"}], "temperature": '
    bodies = [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b"{} {}", b"{'model': 'base'}"]
    bodies += [start + b'"\\ud800"}]}', start + end + b"NaN}", start + end + b"1e999}"]
    bodies += [start + b'"hi"}], "seed": ' + b"9" * 5000 + b"}", b'{"guided_json": {"minimum": -Infinity}}']
    bodies += [b'{"guided_json": ' + b'{"a":' * 70 + b"1" + b"}" * 71, b"[" * 100_000, b'{"a":' * 100_000]
    for body in bodies:
        expect_error(shared.post(CHAT, content=body, headers=JSON), 400)
    assert shared.is_responsive()


def test_json_content_type_is_required(shared):
    """A form on another site cannot send this header without a preflight request."""
    invalid = ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx")
    for content_type, status in (
        *((content_type, 415) for content_type in invalid),
        ("application/json; charset=utf-8", 200),
    ):
        response = shared.post(CHAT, content=json.dumps(GOOD), headers={"Content-Type": content_type})
        assert response.status_code == status and ("error" in response.json()) == (status == 415)


def test_large_bodies_are_rejected_before_reading(start):
    server = start(limits=Limits(body=10_000))
    large = json.dumps(GOOD | {"user": "x" * 20_000}).encode()
    parts = (large[offset : offset + 1000] for offset in range(0, len(large), 1000))  # without Content-Length
    for content in (large, parts):
        assert "10,000 bytes" in expect_error(server.post(CHAT, content=content, headers=JSON), 413)["message"]
    assert server.post(CHAT, json=GOOD | {"user": "x" * 9_000}).status_code == 200
    assert server.is_responsive()


def repeat_element(field: str, element: str) -> str:
    """Return a body with 300,000 elements in a field."""
    return f'{{"model": "base", "{field}": [' + ",".join([element] * 300_000) + "]}"


BODIES_WITH_MANY_ERRORS = {
    "numbers": (COMPLETIONS, repeat_element("prompt", "1.5")),
    "lists": (COMPLETIONS, repeat_element("prompt", "[]")),
    "messages": (CHAT, repeat_element("messages", "{}")),
    "stops": (CHAT, repeat_element("stop", "1")),
    "parts": (CHAT, json.dumps(GOOD).replace('"hi"', "[" + ",".join(["{}"] * 300_000) + "]")),
    "keys": (CHAT, json.dumps(GOOD | {f"a{number}": 0 for number in range(100_000)})),
}


@pytest.mark.parametrize(("path", "body"), BODIES_WITH_MANY_ERRORS.values(), ids=BODIES_WITH_MANY_ERRORS)
def test_number_of_reported_errors_is_limited(shared, monkeypatch, path, body):
    """Reporting each error separately would take gigabytes of memory and block other requests for seconds."""
    from deltaw.serving.http import errors

    error_counts: list[int] = []

    def counted(error, known_fields):
        error_counts.append(error.error_count())
        return errors.validation_error(error, known_fields)

    monkeypatch.setattr("deltaw.serving.http.requests.validation_error", counted)
    expect_error(shared.post(path, content=body, headers=JSON), 400)
    assert sum(error_counts) < 100 and shared.is_responsive()


def test_total_size_of_bodies_is_limited(start):
    server = start(limits=Limits(body=20_000, bodies=50_000))
    body = json.dumps(GOOD | {"user": "x" * 18_000}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def has_status(status: int) -> bool:
        return server.post(CHAT, content=body, headers=JSON).status_code == status

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            slow = stack.enter_context(socket.create_connection(server.address))
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
        assert wait_until(lambda: has_status(429))  # after both bodies have arrived except for a byte
        assert server.post(CHAT, json=GOOD).status_code == 200
    assert wait_until(lambda: has_status(200))


def test_unsupported_and_busy_constraints_return_501_and_429(start, monkeypatch):
    server = start()
    for error, status in (UnsupportedError("the tokenizer cannot be read"), 501), (BusyError("too many"), 429):

        def submit(*arguments: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(server.engine, "submit", submit)
        for stream in (False, True):
            response = server.post(CHAT, json=GOOD | {"guided_regex": "a", "stream": stream})
            assert str(error) in expect_error(response, status)["message"]
            assert ("retry-after" in response.headers) == (status == 429)


def test_oversized_prompt_is_not_tokenized_completely(shared, monkeypatch):
    lengths: list[int] = []
    original = TokenizerPrompts.text
    monkeypatch.setattr(TokenizerPrompts, "text", lambda self, text: lengths.append(len(text)) or original(self, text))
    long = "x" * 3_000_000
    turns = [{"role": "user", "content": "x" * 700}] * 4000
    for path, body in (
        (COMPLETIONS, {"model": "base", "prompt": long}),
        (CHAT, chat_body(long)),
        (CHAT, GOOD | {"messages": turns}),
    ):
        lengths.clear()
        assert expect_error(shared.post(path, json=body), 400)["code"] == "context_length_exceeded"
        assert 0 < sum(lengths) < 100_000


def test_token_and_prompt_limits_are_enforced(start):
    server = start(limits=Limits(prompt=40, new_tokens=7, choices=2))
    error = expect_error(server.post(CHAT, json=chat_body(max_tokens=8)), 400)
    assert error["param"] == "max_tokens" and "7 are allowed" in error["message"]
    expect_error(server.post(CHAT, json=chat_body(n=3)), 400)
    assert expect_error(server.post(CHAT, json=chat_body("x" * 40)), 400)["code"] == "context_length_exceeded"
    usage = server.post(CHAT, json=chat_body("go on")).json()["usage"]
    assert usage["completion_tokens"] == 7  # defaults to the maximum


def test_unknown_paths_and_methods_are_rejected(shared):
    for path in ("/v1/nothing", "/../../etc/passwd"):
        expect_error(shared.get(path), 404)
    expect_error(shared.http.delete("/v1/models"), 405)
    response = shared.get(CHAT)
    assert expect_error(response, 405) and "POST" in response.headers["allow"]
    # Loading adapters is disabled.
    expect_error(shared.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"}), 404)


def test_full_queue_returns_429_with_retry_after(start):
    server = start(limits=Limits(queue=3))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.http.stream("POST", CHAT, json=SLOW | {"stream": True}))
        response = server.post(CHAT, json=GOOD)
        assert expect_error(response, 429)["type"] == "rate_limit_error" and int(response.headers["retry-after"]) > 0
    assert wait_until(lambda: not server.request_queue.pending) and server.is_responsive()


def test_slow_generation_times_out(start):
    server = start(limits=Limits(seconds=0.2))
    error = expect_error(server.post(CHAT, json=SLOW), 504)
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    events = server.post(CHAT, json=SLOW | {"stream": True}).text.strip().split("\n\n")
    assert "timeout" in events[-1] and "[DONE]" not in events[-1]
    assert server.is_responsive()
