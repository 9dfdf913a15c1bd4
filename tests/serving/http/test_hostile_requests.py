"""Bodies that no client should send: each refused with the right status and field, the server unharmed."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

import pytest

from deltaw.serving.http.preparing import TokenizerPrompts
from deltaw.serving.http.settings import Limits
from deltaw.serving.request import BusyError, UnsupportedError
from tests.serving.http.asking import CHAT, COMPLETIONS, GOOD, JSON, SLOW, refusal, said
from tests.serving.http.waiting import until

FUNCTION = {"type": "function", "function": {"name": "f"}}
# Values that a field must not have; the error names the field.
WRONG: dict[str, list[Any]] = {"temprature": [1], "temperature": ["1", True, 2.1, [1]], "top_p": [0], "seed": [1.5]}
WRONG |= {"n": [0, 1.5, 10**30, 17], "max_tokens": [0, -1, 5000], "stop": ["", [""], ["a"] * 17, {"a": 1}]}
WRONG |= {"logit_bias": [{"x": 1}, {"-1": 1}, {"1": 101}], "logprobs": [2], "stream": ["yes"], "model": ["", None, 5]}
WRONG |= {"guided_json": ["not JSON", {"a": "x" * 70_000}], "functions": [[]], "store": [True]}
WRONG |= {"tools": [[{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}]]}
WRONG |= {"service_tier": ["priority"], "reasoning_effort": ["high"], "modalities": [["text", "audio"]]}
WRONG |= {"response_format": [{"type": "json_schema"}, {"type": "xml"}]}
TURNS = ({"role": "user"}, {"role": "king", "content": "hi"}, {"role": "user", "content": 1})
WRONG |= {"messages": [[], "hi", *([turn] for turn in TURNS)]}
# Fields that do not go together, and where the error stands, if it stands in one.
TOGETHER: list[tuple[dict[str, Any], str | None]] = [
    ({"max_tokens": 1, "max_completion_tokens": 1}, None),
    ({"top_logprobs": 2}, None),
    ({"stream_options": {"include_usage": True}}, None),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, None),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, None),
    ({"guided_regex": "impossible"}, None),
    ({"tool_choice": "required"}, None),
    ({"tools": [FUNCTION]}, "messages"),  # no place in the template
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"messages": [{"role": "user", "content": "hi", "weight": 1}]}, "messages.0.weight"),
    ({"messages": [*GOOD["messages"], {"role": "assistant", "content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
]


def test_wrong_fields_are_refused_by_name(shared):
    wrong = [({field: value}, field) for field, values in WRONG.items() for value in values]
    for change, param in [*wrong, *TOGETHER]:
        error = refusal(shared.post(CHAT, json=GOOD | change), 400)
        assert error["type"] == "invalid_request_error"
        assert param is None or str(error["param"]).startswith(param), change
    error = refusal(shared.post(CHAT, json=GOOD | {"temprature": 1}), 400)
    assert error["code"] == "unknown_parameter" and "'temperature'" in error["message"], "the nearest is named"
    error = refusal(shared.post(CHAT, json={"model": "base"}), 400)
    assert (error["code"], error["param"]) == ("missing_required_parameter", "messages")
    assert shared.answers()


@pytest.mark.parametrize("user", [None, "text"])
def test_fields_without_meaning_are_accepted(shared, user):
    harmless = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "audio": None, "user": user}
    assert shared.post(CHAT, json=GOOD | harmless).status_code == 200


def test_wrong_completions_are_refused(shared):
    prompts = ["", [], [[]], ["a", 1], [1, 2.5], [-1], [10**12], [300], None, ["a"] * 17, "x" * 4096]
    changes: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    changes += [{"prompt": ["a"] * 9, "n": 2}, {"max_tokens": 0}, {"logprobs": 21}, {"echo": "yes"}]
    changes += [{"suffix": "x"}, {"best_of": 2}, {"messages": []}]
    for change in changes:
        refusal(shared.post(COMPLETIONS, json={"model": "base", "prompt": "a"} | change), 400)
    error = refusal(shared.post(COMPLETIONS, json={"model": "base", "prompt": "x" * 5000}), 400)
    assert error["code"] == "context_length_exceeded" and "4,096 positions" in error["message"]
    assert shared.answers()


def test_models_that_there_are_not(shared):
    for name in ("nobody", "../../etc/passwd", "/", "a\x00b", "ＢＡＳＥ", "base ", "poet/"):
        error = refusal(shared.post(CHAT, json=GOOD | {"model": name}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_bodies_that_are_no_request(shared):
    start = b'{"model": "base", "messages": [{"role": "user", "content": '
    end = b'"hi"}], "temperature": '
    bodies = [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b"{} {}", b"{'model': 'base'}"]
    bodies += [start + b'"\\ud800"}]}', start + end + b"NaN}", start + end + b"1e999}"]
    bodies += [start + b'"hi"}], "seed": ' + b"9" * 5000 + b"}", b'{"guided_json": {"minimum": -Infinity}}']
    bodies += [b'{"guided_json": ' + b'{"a":' * 70 + b"1" + b"}" * 71, b"[" * 100_000, b'{"a":' * 100_000]
    for body in bodies:
        refusal(shared.post(CHAT, content=body, headers=JSON), 400)
    assert shared.answers()


def test_a_body_must_say_that_it_is_json(shared):
    """A form of another site cannot send this header without asking first."""
    wrong = ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx")
    for kind, status in (*((kind, 415) for kind in wrong), ("application/json; charset=utf-8", 200)):
        response = shared.post(CHAT, content=json.dumps(GOOD), headers={"Content-Type": kind})
        assert response.status_code == status and ("error" in response.json()) == (status == 415)


def test_large_bodies_are_refused_before_they_are_read(start):
    server = start(limits=Limits(body=10_000))
    large = json.dumps(GOOD | {"user": "x" * 20_000}).encode()
    parts = (large[at : at + 1000] for at in range(0, len(large), 1000))  # without Content-Length
    for content in (large, parts):
        assert "10,000 bytes" in refusal(server.post(CHAT, content=content, headers=JSON), 413)["message"]
    assert server.post(CHAT, json=GOOD | {"user": "x" * 9_000}).status_code == 200
    assert server.answers()


def many(field: str, element: str) -> str:
    """A body with very many elements in a field."""
    return f'{{"model": "base", "{field}": [' + ",".join([element] * 300_000) + "]}"


MISTAKES = {
    "numbers": (COMPLETIONS, many("prompt", "1.5")),
    "lists": (COMPLETIONS, many("prompt", "[]")),
    "messages": (CHAT, many("messages", "{}")),
    "stops": (CHAT, many("stop", "1")),
    "parts": (CHAT, json.dumps(GOOD).replace('"hi"', "[" + ",".join(["{}"] * 300_000) + "]")),
    "keys": (CHAT, json.dumps(GOOD | {f"a{number}": 0 for number in range(100_000)})),
}


@pytest.mark.parametrize(("path", "body"), MISTAKES.values(), ids=MISTAKES)
def test_very_many_mistakes_cost_what_few_do(shared, monkeypatch, path, body):
    """Each would be an error with a text of its own: gigabytes, and seconds for all other requests."""
    from deltaw.serving.http import errors

    found: list[int] = []

    def counted(error, known):
        found.append(error.error_count())
        return errors.wrong_field(error, known)

    monkeypatch.setattr("deltaw.serving.http.requests.wrong_field", counted)
    refusal(shared.post(path, content=body, headers=JSON), 400)
    assert sum(found) < 100 and shared.answers()


def test_bodies_together_have_a_bound(start):
    server = start(limits=Limits(body=20_000, bodies=50_000))
    body = json.dumps(GOOD | {"user": "x" * 18_000}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    def answered(status: int) -> bool:
        return server.post(CHAT, content=body, headers=JSON).status_code == status

    with contextlib.ExitStack() as stack:
        for _ in range(2):
            slow = stack.enter_context(socket.create_connection(server.address))
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
        assert until(lambda: answered(429))  # when both have arrived but for a byte
        assert server.post(CHAT, json=GOOD).status_code == 200
    assert until(lambda: answered(200))


def test_constraints_that_are_not_possible_or_not_now(start, monkeypatch):
    server = start()
    for error, status in (UnsupportedError("the tokenizer cannot be read"), 501), (BusyError("too many"), 429):

        def submit(*given: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(server.engine, "submit", submit)
        for stream in (False, True):
            response = server.post(CHAT, json=GOOD | {"guided_regex": "a", "stream": stream})
            assert str(error) in refusal(response, status)["message"]
            assert ("retry-after" in response.headers) == (status == 429)


def test_a_prompt_far_too_long_is_not_tokenized_to_its_end(shared, monkeypatch):
    read: list[int] = []
    plain = TokenizerPrompts.text
    monkeypatch.setattr(TokenizerPrompts, "text", lambda self, given: read.append(len(given)) or plain(self, given))
    long = "x" * 3_000_000
    turns = [{"role": "user", "content": "x" * 700}] * 4000
    for path, asked in (
        (COMPLETIONS, {"model": "base", "prompt": long}),
        (CHAT, said(long)),
        (CHAT, GOOD | {"messages": turns}),
    ):
        read.clear()
        assert refusal(shared.post(path, json=asked), 400)["code"] == "context_length_exceeded"
        assert 0 < sum(read) < 100_000


def test_limits_of_tokens_and_prompts(start):
    server = start(limits=Limits(prompt=40, new_tokens=7, choices=2))
    error = refusal(server.post(CHAT, json=said(max_tokens=8)), 400)
    assert error["param"] == "max_tokens" and "7 are allowed" in error["message"]
    refusal(server.post(CHAT, json=said(n=3)), 400)
    assert refusal(server.post(CHAT, json=said("x" * 40)), 400)["code"] == "context_length_exceeded"
    usage = server.post(CHAT, json=said("go on")).json()["usage"]
    assert usage["completion_tokens"] == 7  # where nothing is asked, as many as may be


def test_paths_and_methods_that_there_are_not(shared):
    for path in ("/v1/nothing", "/../../etc/passwd"):
        refusal(shared.get(path), 404)
    refusal(shared.http.delete("/v1/models"), 405)
    response = shared.get(CHAT)
    assert refusal(response, 405) and "POST" in response.headers["allow"]
    # Loading adapters is off.
    refusal(shared.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"}), 404)


def test_a_full_queue_says_when_to_ask_again(start):
    server = start(limits=Limits(queue=3))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(server.http.stream("POST", CHAT, json=SLOW | {"stream": True}))
        response = server.post(CHAT, json=GOOD)
        assert refusal(response, 429)["type"] == "rate_limit_error" and int(response.headers["retry-after"]) > 0
    assert until(lambda: not server.desk.in_hand) and server.answers()


def test_a_text_that_takes_too_long_is_given_up(start):
    server = start(limits=Limits(seconds=0.2))
    error = refusal(server.post(CHAT, json=SLOW), 504)
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    events = server.post(CHAT, json=SLOW | {"stream": True}).text.strip().split("\n\n")
    assert "timeout" in events[-1] and "[DONE]" not in events[-1]
    assert server.answers()
