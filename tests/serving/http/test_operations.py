"""What those who run a server see of it: probes, metrics, logs, and how it ends."""

from __future__ import annotations

import io
import json
import threading
from typing import TYPE_CHECKING, Any

from deltaw.serving.http.settings import Limits, ServerSettings
from tests.serving.http.test_hostile_requests import CHAT, GOOD, refusal
from tests.serving.http.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serving.http.running import Running

SLOW = GOOD | {"messages": [{"role": "user", "content": "be slow"}]}


def values(server: Running) -> dict[str, float]:
    """The metrics by name and labels."""
    with server.client() as client:
        response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_count_what_was_done(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0), "poet")
    with server.client() as client:
        usage = client.post(CHAT, json=GOOD | {"model": "poet"}).json()["usage"]
        client.post(CHAT, json=GOOD | {"model": "poet", "stream": True})
        client.post(CHAT, json=GOOD | {"model": "x" * 100})
        client.get("/a/path/that/nobody/knows")
    found = values(server)
    requests = 'deltaw_requests_total{model="poet",route="/v1/chat/completions",status="200"}'
    assert found[requests] == 2
    assert found['deltaw_requests_total{model="",route="/v1/chat/completions",status="404"}'] == 1
    assert found['deltaw_requests_total{model="",route="other",status="404"}'] == 1
    assert found['deltaw_completion_tokens_total{model="poet"}'] == 2 * usage["completion_tokens"]
    assert found['deltaw_prompt_tokens_total{model="poet"}'] == 2 * usage["prompt_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert found['deltaw_cached_prompt_tokens_total{model="poet"}'] == 2 * cached
    assert found['deltaw_texts_total{finish="stop",model="poet"}'] == 2
    assert found["deltaw_first_token_seconds_count"] == 2 and found["deltaw_token_seconds_count"] == 2
    assert found["deltaw_pages"] == 10 and found["deltaw_adapters_loaded"] == 1
    assert found["deltaw_in_hand"] == 0
    # Names that clients make up are no labels.
    assert not any("xxx" in name or "nobody" in name for name in found)


def test_texts_in_hand_are_seen(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0))
    with server.client() as client, client.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        until(lambda: values(server)["deltaw_running"] >= 1)
        found = values(server)
        assert found["deltaw_in_hand"] == 1 and found["deltaw_running"] == 1


def logged(server_settings: ServerSettings, start: Callable[..., Running], work: Any) -> list[dict[str, Any]]:
    """The lines of the log while ``work`` asks a server."""
    from deltaw.serving.http.guard import request_log

    stream = io.StringIO()
    with request_log(stream):
        server = start(server_settings, "poet")
        with server.client() as client:
            work(client)
        until(lambda: not server.server.server_state.tasks)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_request_is_one_line_of_json_without_its_prompt(start: Callable[..., Running]) -> None:
    key = "a-key-for-this"

    def work(client: Any) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        secret = GOOD | {"model": "poet", "messages": [{"role": "user", "content": "my secret"}]}
        client.post(CHAT, json=secret, headers=headers)
        client.post(CHAT, json=GOOD, headers={"Authorization": "Bearer wrong-key-of-mine"})
        client.get("/health")

    first, second, third = logged(ServerSettings(port=0, keys=(key,)), start, work)
    assert first["event"] == "request" and first["route"] == CHAT and first["status"] == 200
    assert first["model"] == "poet" and first["finish"] == ["stop"] and first["completion_tokens"] == 15
    assert first["seconds"] >= first["first_token_seconds"] > 0 and first["id"] and first["time"]
    assert second["status"] == 401 and third["route"] == "/health"
    written = json.dumps([first, second, third]).lower()
    assert "secret" not in written and key not in written and "wrong-key" not in written


def test_prompts_are_logged_where_that_is_asked_for(start: Callable[..., Running]) -> None:
    def work(client: Any) -> None:
        client.post(CHAT, json=GOOD)
        client.post("/v1/completions", json={"model": "base", "prompt": ["a", "b"]})

    chat, completion = logged(ServerSettings(port=0, log_prompts=True), start, work)
    assert chat["asked"] == [{"role": "user", "content": "hi"}] and completion["asked"] == ["a", "b"]


def test_faults_are_logged_with_their_traceback(start: Callable[..., Running]) -> None:
    def work(client: Any) -> None:
        fails = GOOD | {"messages": [{"role": "user", "content": "fail"}]}
        error = refusal(client.post(CHAT, json=fails), 500)
        assert "Runtime" not in error["message"]
        client.post(CHAT, json=fails | {"stream": True})

    for line in logged(ServerSettings(port=0), start, work):
        assert line["level"] == "error" and "a secret of the engine" in line["traceback"]


def test_texts_in_hand_are_finished_at_shutdown(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0))
    answers: list[Any] = []

    def ask(stream: bool) -> None:
        with server.client() as client:
            answers.append(client.post(CHAT, json=SLOW | {"stream": stream, "max_tokens": 20}))

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    until(lambda: server.desk.in_hand == 2)
    with server.client() as idle:
        assert idle.get("/ready").status_code == 200
        server.desk.closing = True  # what a signal sets at once
        assert refusal(idle.get("/ready"), 503)["code"] == "shutting_down"
        late = idle.post(CHAT, json=GOOD)
        assert refusal(late, 503)["code"] == "shutting_down" and late.headers["retry-after"]
        server.server.should_exit = True
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    whole = next(answer for answer in answers if "data:" not in answer.text).json()
    assert whole["usage"]["completion_tokens"] == 20
    streamed = next(answer for answer in answers if "data:" in answer.text).text
    assert streamed.endswith("data: [DONE]\n\n")


def test_what_takes_too_long_at_shutdown_is_cancelled_and_told(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(shutdown_seconds=0.2)))
    with server.client() as client, client.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        server.server.should_exit = True
        rest = "".join(parts)
    assert "shutting_down" in rest and "[DONE]" not in rest
    assert server.engine.cancelled == 1


def test_a_second_signal_cancels_what_is_in_hand(start: Callable[..., Running]) -> None:
    import signal

    server = start(ServerSettings(port=0, limits=Limits(shutdown_seconds=600)))
    with server.client() as client, client.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        text = next(parts)
        server.server.handle_exit(signal.SIGTERM, None)
        text += next(parts)  # the first signal leaves it to end
        server.server.handle_exit(signal.SIGTERM, None)
        rest = "".join(parts)
    assert "shutting_down" not in text and "shutting_down" in rest
    assert not server.server.interrupted and not server.server.force_exit
