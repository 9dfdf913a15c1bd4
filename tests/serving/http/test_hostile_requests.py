"""Bodies that no client should send: each refused with the right status and field, the server unharmed."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pydantic import ValidationError

from deltaw.serving.http.preparing import TokenizerPrompts
from deltaw.serving.http.settings import Limits, ServerSettings
from deltaw.serving.request import BusyError, UnsupportedError
from tests.serving.http.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serving.http.running import Running

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}
GOOD: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def refusal(response: Any, status: int) -> dict[str, Any]:
    """The error object, which has OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def answers(server: Running) -> bool:
    """Whether the server still does its work, and holds nothing that it should have let go."""
    with server.client() as client:
        good = client.post(CHAT, json=GOOD)
    # The server lets go of a text after the answer's last byte, which the client may be the first to see.
    return good.status_code == 200 and until(lambda: not server.desk.in_hand)


FUNCTION = {"type": "function", "function": {"name": "f"}}
# Values that a field must not have; the error names the field.
WRONG: dict[str, list[Any]] = {
    "temprature": [1],
    "temperature": ["1", True, 2.1, [1]],
    "top_p": [0],
    "n": [0, 1.5, 10**30, 17],
    "max_tokens": [0, -1, 5000],
    "stop": ["", [""], ["a"] * 17, {"a": 1}],
    "seed": [1.5],
    "logit_bias": [{"x": 1}, {"-1": 1}, {"1": 101}],
    "logprobs": [2],
    "stream": ["yes"],
    "guided_json": ["not JSON", {"a": "x" * 70_000}],
    "tools": [[{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}]],
    "functions": [[]],
    "store": [True],
    "service_tier": ["priority"],
    "reasoning_effort": ["high"],
    "modalities": [["text", "audio"]],
    "model": ["", None, 5],
    "response_format": [{"type": "json_schema"}, {"type": "xml"}],
    "messages": [[], "hi", [{"role": "user"}], [{"role": "king", "content": "hi"}], [{"role": "user", "content": 1}]],
}
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


def test_wrong_fields_are_refused_by_name(shared: Running) -> None:
    wrong = [({field: value}, field) for field, values in WRONG.items() for value in values]
    with shared.client() as client:
        for change, param in [*wrong, *TOGETHER]:
            error = refusal(client.post(CHAT, json=GOOD | change), 400)
            assert error["type"] == "invalid_request_error"
            assert param is None or str(error["param"]).startswith(param), change
    assert answers(shared)


def test_an_unknown_field_names_the_nearest(shared: Running) -> None:
    with shared.client() as client:
        error = refusal(client.post(CHAT, json=GOOD | {"temprature": 1}), 400)
        assert error["code"] == "unknown_parameter" and "'temperature'" in error["message"]
        error = refusal(client.post(CHAT, json={"model": "base"}), 400)
        assert error["code"] == "missing_required_parameter" and error["param"] == "messages"


def test_fields_without_meaning_are_accepted(shared: Running) -> None:
    harmless = {"metadata": {"a": "b"}, "store": False, "service_tier": "auto", "audio": None}
    with shared.client() as client:
        for user in (None, "text"):
            assert client.post(CHAT, json=GOOD | harmless | {"user": user}).status_code == 200


def test_wrong_completions_are_refused(shared: Running) -> None:
    prompts = ["", [], [[]], ["a", 1], [1, 2.5], [-1], [10**12], [300], None, ["a"] * 17, "x" * 4096]
    changes: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    changes += [{"prompt": ["a"] * 9, "n": 2}, {"max_tokens": 0}, {"logprobs": 21}, {"echo": "yes"}]
    changes += [{"suffix": "x"}, {"best_of": 2}, {"messages": []}]
    with shared.client() as client:
        for change in changes:
            refusal(client.post(COMPLETIONS, json={"model": "base", "prompt": "a"} | change), 400)
    assert answers(shared)


def test_a_prompt_that_is_too_long_says_so(shared: Running) -> None:
    with shared.client() as client:
        error = refusal(client.post(COMPLETIONS, json={"model": "base", "prompt": "x" * 5000}), 400)
    assert error["code"] == "context_length_exceeded" and "4,096 positions" in error["message"]


def test_models_that_there_are_not(shared: Running) -> None:
    with shared.client() as client:
        for name in ("nobody", "../../etc/passwd", "/", "a\x00b", "ＢＡＳＥ", "base ", "poet/"):
            error = refusal(client.post(CHAT, json=GOOD | {"model": name}), 404)
            assert error["code"] == "model_not_found" and error["param"] == "model"


def test_bodies_that_are_no_request(shared: Running) -> None:
    start = b'{"model": "base", "messages": [{"role": "user", "content": '
    end = b'"hi"}], "temperature": '
    bodies = [b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe{}", b"{} {}", b"{'model': 'base'}"]
    bodies += [start + b'"\\ud800"}]}', start + end + b"NaN}", start + end + b"1e999}"]
    bodies += [start + b'"hi"}], "seed": ' + b"9" * 5000 + b"}", b'{"guided_json": {"minimum": -Infinity}}']
    bodies += [b'{"guided_json": ' + b'{"a":' * 70 + b"1" + b"}" * 71, b"[" * 100_000, b'{"a":' * 100_000]
    with shared.client() as client:
        for body in bodies:
            refusal(client.post(CHAT, content=body, headers=JSON), 400)
    assert answers(shared)


def test_a_body_must_say_that_it_is_json(shared: Running) -> None:
    """A form of another site cannot send this header without asking first."""
    with shared.client() as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
            response = client.post(CHAT, content=json.dumps(GOOD), headers={"Content-Type": kind})
            refusal(response, 415)
        kind = "application/json; charset=utf-8"
        assert client.post(CHAT, content=json.dumps(GOOD), headers={"Content-Type": kind}).status_code == 200


def test_large_bodies_are_refused_before_they_are_read(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(body=10_000)))
    large = json.dumps(GOOD | {"user": "x" * 20_000}).encode()

    def parts() -> Any:  # without Content-Length
        for at in range(0, len(large), 1000):
            yield large[at : at + 1000]

    with server.client() as client:
        for content in (large, parts()):
            error = refusal(client.post(CHAT, content=content, headers=JSON), 413)
            assert "10,000 bytes" in error["message"]
        just = json.dumps(GOOD | {"user": "x" * 9_000}).encode()
        assert client.post(CHAT, content=just, headers=JSON).status_code == 200
    assert answers(server)


def many(field: str, element: str) -> str:
    """A body with very many elements in a field."""
    return f'{{"model": "base", "{field}": [' + ",".join([element] * 300_000) + "]}"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, many("prompt", "1.5")),
        (COMPLETIONS, many("prompt", "[]")),
        (CHAT, many("messages", "{}")),
        (CHAT, many("stop", "1")),
        (CHAT, json.dumps(GOOD).replace('"hi"', "[" + ",".join(["{}"] * 300_000) + "]")),
        (CHAT, json.dumps(GOOD | {f"a{number}": 0 for number in range(100_000)})),
    ],
    ids=["numbers", "lists", "messages", "stops", "parts", "keys"],
)
def test_very_many_mistakes_cost_what_few_do(
    shared: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: str
) -> None:
    """Each would be an error with a text of its own: gigabytes, and seconds for all other requests."""
    from deltaw.serving.http import errors

    found: list[int] = []

    def counted(error: ValidationError, known: dict[str, object]) -> errors.ApiError:
        found.append(error.error_count())
        return errors.wrong_field(error, known)

    monkeypatch.setattr("deltaw.serving.http.requests.wrong_field", counted)
    with shared.client() as client:
        refusal(client.post(path, content=body, headers=JSON), 400)
    assert sum(found) < 100
    assert answers(shared)


def test_bodies_together_have_a_bound(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(body=20_000, bodies=50_000)))
    body = json.dumps(GOOD | {"user": "x" * 18_000}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            slow = stack.enter_context(socket.create_connection(server.address))
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])

        def status() -> int:
            with server.client() as client:
                return client.post(CHAT, content=body, headers=JSON).status_code

        assert until(lambda: status() == 429)  # when both have arrived but for a byte
        with server.client() as client:
            assert client.post(CHAT, json=GOOD).status_code == 200
    assert until(lambda: status() == 200)


@pytest.mark.parametrize(
    ("error", "status"),
    [(UnsupportedError("the tokenizer cannot be read"), 501), (BusyError("too many are compiled"), 429)],
)
def test_constraints_that_are_not_possible_or_not_now(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    server = start(ServerSettings(port=0))

    def submit(*given: object) -> None:
        raise error

    monkeypatch.setattr(server.engine, "submit", submit)
    with server.client() as client:
        for stream in (False, True):
            response = client.post(CHAT, json=GOOD | {"guided_regex": "a", "stream": stream})
            assert str(error) in refusal(response, status)["message"]
            assert ("retry-after" in response.headers) == (status == 429)


def test_a_prompt_far_too_long_is_not_tokenized_to_its_end(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def text(self: TokenizerPrompts, given: str) -> np.ndarray:
        nonlocal read
        read += len(given)
        return plain(self, given)

    plain = TokenizerPrompts.text
    monkeypatch.setattr(TokenizerPrompts, "text", text)
    server = start(ServerSettings(port=0))
    long = "x" * 3_000_000
    with server.client() as client:
        for path, asked in (
            (COMPLETIONS, {"model": "base", "prompt": long}),
            (CHAT, GOOD | {"messages": [{"role": "user", "content": long}]}),
            (CHAT, GOOD | {"messages": [{"role": "user", "content": "x" * 700}] * 4000}),
        ):
            read = 0
            error = refusal(client.post(path, json=asked), 400)
            assert error["code"] == "context_length_exceeded" and 0 < read < 100_000


def test_limits_of_tokens_and_prompts(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(prompt=40, new_tokens=7, choices=2)))
    with server.client() as client:
        error = refusal(client.post(CHAT, json=GOOD | {"max_tokens": 8}), 400)
        assert error["param"] == "max_tokens" and "7 are allowed" in error["message"]
        refusal(client.post(CHAT, json=GOOD | {"n": 3}), 400)
        long = [{"role": "user", "content": "x" * 40}]
        error = refusal(client.post(CHAT, json=GOOD | {"messages": long}), 400)
        assert error["code"] == "context_length_exceeded"
        text = client.post(CHAT, json=GOOD | {"messages": [{"role": "user", "content": "go on"}]}).json()
    assert text["usage"]["completion_tokens"] == 7  # where nothing is asked, as many as may be


def test_paths_and_methods_that_there_are_not(shared: Running) -> None:
    with shared.client() as client:
        refusal(client.get("/v1/nothing"), 404)
        refusal(client.get("/../../etc/passwd"), 404)
        assert "POST" in client.get(CHAT).headers["allow"]
        refusal(client.get(CHAT), 405)
        refusal(client.request("DELETE", "/v1/models"), 405)
        # Loading adapters is off.
        refusal(client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "/"}), 404)


def test_a_full_queue_says_when_to_ask_again(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(queue=3)))
    slow = GOOD | {"messages": [{"role": "user", "content": "be slow"}]}
    with server.client() as client:
        opened = []
        for _ in range(3):
            request = client.build_request("POST", CHAT, json=slow | {"stream": True})
            opened.append(client.send(request, stream=True))
        response = client.post(CHAT, json=GOOD)
        error = refusal(response, 429)
        assert error["type"] == "rate_limit_error" and int(response.headers["retry-after"]) > 0
        for response in opened:
            response.close()
        assert until(lambda: not server.desk.in_hand)
        assert client.post(CHAT, json=GOOD).status_code == 200
    assert answers(server)


def test_a_text_that_takes_too_long_is_given_up(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(seconds=0.2)))
    slow = GOOD | {"messages": [{"role": "user", "content": "be slow"}]}
    with server.client() as client:
        error = refusal(client.post(CHAT, json=slow), 504)
        assert error["code"] == "timeout" and error["type"] == "server_error"
        events = client.post(CHAT, json=slow | {"stream": True}).text.strip().split("\n\n")
    assert "timeout" in events[-1] and "[DONE]" not in events[-1]
    assert answers(server)
