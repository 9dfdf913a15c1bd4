"""Tests of server operation: probes, metrics, logs and shutdown."""

from __future__ import annotations

import io
import json
import signal
import threading
from typing import Any

from deltaw.serving.http.settings import Limits
from tests.serving.http.api_requests import CHAT, COMPLETIONS, GOOD, SLOW, chat_body, expect_error
from tests.serving.http.concurrency import wait_until


def read_metrics(server) -> dict[str, float]:
    """Return the metrics by name and labels."""
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_requests_and_tokens(start):
    server = start("poet")
    usage = server.post(CHAT, json=chat_body(model="poet")).json()["usage"]
    server.post(CHAT, json=chat_body(model="poet", stream=True))
    server.post(CHAT, json=chat_body(model="x" * 100))
    server.get("/a/path/that/is/unknown")
    metrics = read_metrics(server)
    expected = {
        'requests_total{model="poet",route="/v1/chat/completions",status="200"}': 2,
        'requests_total{model="",route="/v1/chat/completions",status="404"}': 1,
        'requests_total{model="",route="other",status="404"}': 1,
        'completion_tokens_total{model="poet"}': 2 * usage["completion_tokens"],
        'prompt_tokens_total{model="poet"}': 2 * usage["prompt_tokens"],
        'cached_prompt_tokens_total{model="poet"}': 2 * usage["prompt_tokens_details"]["cached_tokens"],
        'completions_total{finish="stop",model="poet"}': 2,
    } | {"first_token_seconds_count": 2, "token_seconds_count": 2, "pages": 10, "adapters_loaded": 1, "pending": 0}
    assert {name: metrics.get(f"deltaw_{name}") for name in expected} == expected
    # Unknown names from requests must not become labels.
    assert not any("xxx" in name or "/unknown" in name for name in metrics)


def test_running_generations_are_in_metrics(start):
    server = start()
    with server.http.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        assert wait_until(lambda: read_metrics(server)["deltaw_running"] == 1)
        assert read_metrics(server)["deltaw_pending"] == 1


def collect_log(start, work, **settings: Any) -> list[dict[str, Any]]:
    """Return the log entries of a server while ``work`` sends requests to it."""
    from deltaw.serving.http.guard import request_log

    stream = io.StringIO()
    with request_log(stream):
        server = start("poet", **settings)
        work(server)
        wait_until(lambda: not server.server.server_state.tasks)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_request_log_is_json_without_prompts_or_keys(start):
    key = "a-key-for-this"

    def work(server) -> None:
        for body, sent_key in (chat_body("my secret", model="poet"), key), (GOOD, "wrong-key-of-mine"):
            server.post(CHAT, json=body, headers={"Authorization": f"Bearer {sent_key}"})
        server.get("/health")

    first, second, third = collect_log(start, work, keys=(key,))
    expected = {"event": "request", "route": CHAT, "status": 200, "model": "poet", "finish": ["stop"]}
    assert {name: first[name] for name in expected} == expected and first["completion_tokens"] == 15
    assert first["seconds"] >= first["first_token_seconds"] > 0 and first["id"] and first["time"]
    assert second["status"] == 401 and third["route"] == "/health"
    log_text = json.dumps([first, second, third]).lower()
    assert "secret" not in log_text and key not in log_text and "wrong-key" not in log_text


def test_log_contains_prompts_if_enabled_and_tracebacks(start):
    def work(server) -> None:
        server.post(CHAT, json=GOOD)
        server.post(COMPLETIONS, json={"model": "base", "prompt": ["a", "b"]})
        assert "Runtime" not in expect_error(server.post(CHAT, json=chat_body("fail")), 500)["message"]
        server.post(CHAT, json=chat_body("fail", stream=True))

    chat, completion, *faults = collect_log(start, work, log_prompts=True)
    assert chat["asked"] == [{"role": "user", "content": "hi"}] and completion["asked"] == ["a", "b"]
    assert len(faults) == 2
    for line in faults:
        assert line["level"] == "error" and "a secret of the engine" in line["traceback"]


def test_shutdown_finishes_running_requests(start):
    server = start()
    answers: dict[bool, Any] = {}

    def send(stream: bool) -> None:
        answers[stream] = server.post(CHAT, json=SLOW | {"stream": stream, "max_tokens": 12})

    threads = [threading.Thread(target=send, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: len(server.request_queue._groups) == 2)
    assert server.get("/ready").status_code == 200
    server.request_queue.closing = True  # set immediately by a signal
    late = server.post(CHAT, json=GOOD)
    for response in (server.get("/ready"), late):
        assert expect_error(response, 503)["code"] == "shutting_down"
    assert late.headers["retry-after"]
    server.server.should_exit = True
    for thread in threads:
        thread.join()
    assert answers[False].json()["usage"]["completion_tokens"] == 12
    assert answers[True].text.endswith("data: [DONE]\n\n")


def test_shutdown_timeout_cancels_requests_with_error(start):
    server = start(limits=Limits(shutdown_seconds=0.2))
    with server.http.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        server.server.should_exit = True
        rest = "".join(parts)
    assert "shutting_down" in rest and "[DONE]" not in rest
    assert server.engine.cancelled == 1


def test_second_signal_cancels_running_requests(start):
    server = start(limits=Limits(shutdown_seconds=600))
    with server.http.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        text = next(parts)
        server.server.handle_exit(signal.SIGTERM, None)
        text += next(parts)  # the first signal lets it finish
        server.server.handle_exit(signal.SIGTERM, None)
        rest = "".join(parts)
    assert "shutting_down" not in text and "shutting_down" in rest
    assert not server.server.interrupted and not server.server.force_exit
