"""What those who run a server see of it: probes, metrics, logs, and how it ends."""

from __future__ import annotations

import io
import json
import signal
import threading
from typing import Any

from deltaw.serving.http.settings import Limits
from tests.serving.http.asking import CHAT, COMPLETIONS, GOOD, SLOW, refusal, said
from tests.serving.http.waiting import until


def values(server) -> dict[str, float]:
    """The metrics by name and labels."""
    response = server.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_what_was_done(start):
    server = start("poet")
    usage = server.post(CHAT, json=said(model="poet")).json()["usage"]
    server.post(CHAT, json=said(model="poet", stream=True))
    server.post(CHAT, json=said(model="x" * 100))
    server.get("/a/path/that/nobody/knows")
    found = values(server)
    expected = {
        'requests_total{model="poet",route="/v1/chat/completions",status="200"}': 2,
        'requests_total{model="",route="/v1/chat/completions",status="404"}': 1,
        'requests_total{model="",route="other",status="404"}': 1,
        'completion_tokens_total{model="poet"}': 2 * usage["completion_tokens"],
        'prompt_tokens_total{model="poet"}': 2 * usage["prompt_tokens"],
        'cached_prompt_tokens_total{model="poet"}': 2 * usage["prompt_tokens_details"]["cached_tokens"],
        'texts_total{finish="stop",model="poet"}': 2,
    } | {"first_token_seconds_count": 2, "token_seconds_count": 2, "pages": 10, "adapters_loaded": 1, "in_hand": 0}
    assert {name: found.get(f"deltaw_{name}") for name in expected} == expected
    # Names that clients make up are no labels.
    assert not any("xxx" in name or "nobody" in name for name in found)


def test_texts_in_hand_are_seen(start):
    server = start()
    with server.http.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        assert until(lambda: values(server)["deltaw_running"] == 1)
        assert values(server)["deltaw_in_hand"] == 1


def logged(start, work, **settings: Any) -> list[dict[str, Any]]:
    """The lines of the log while ``work`` asks a server."""
    from deltaw.serving.http.guard import request_log

    stream = io.StringIO()
    with request_log(stream):
        server = start("poet", **settings)
        work(server)
        until(lambda: not server.server.server_state.tasks)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_request_is_one_line_of_json_without_its_prompt(start):
    key = "a-key-for-this"

    def work(server) -> None:
        for asked, sent in (said("my secret", model="poet"), key), (GOOD, "wrong-key-of-mine"):
            server.post(CHAT, json=asked, headers={"Authorization": f"Bearer {sent}"})
        server.get("/health")

    first, second, third = logged(start, work, keys=(key,))
    expected = {"event": "request", "route": CHAT, "status": 200, "model": "poet", "finish": ["stop"]}
    assert {name: first[name] for name in expected} == expected and first["completion_tokens"] == 15
    assert first["seconds"] >= first["first_token_seconds"] > 0 and first["id"] and first["time"]
    assert second["status"] == 401 and third["route"] == "/health"
    written = json.dumps([first, second, third]).lower()
    assert "secret" not in written and key not in written and "wrong-key" not in written


def test_prompts_are_logged_where_that_is_asked_for_and_faults_with_their_traceback(start):
    def work(server) -> None:
        server.post(CHAT, json=GOOD)
        server.post(COMPLETIONS, json={"model": "base", "prompt": ["a", "b"]})
        assert "Runtime" not in refusal(server.post(CHAT, json=said("fail")), 500)["message"]
        server.post(CHAT, json=said("fail", stream=True))

    chat, completion, *faults = logged(start, work, log_prompts=True)
    assert chat["asked"] == [{"role": "user", "content": "hi"}] and completion["asked"] == ["a", "b"]
    assert len(faults) == 2
    for line in faults:
        assert line["level"] == "error" and "a secret of the engine" in line["traceback"]


def test_texts_in_hand_are_finished_at_shutdown(start):
    server = start()
    answers: dict[bool, Any] = {}

    def ask(stream: bool) -> None:
        answers[stream] = server.post(CHAT, json=SLOW | {"stream": stream, "max_tokens": 12})

    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    assert until(lambda: server.desk.in_hand == 2)
    assert server.get("/ready").status_code == 200
    server.desk.closing = True  # what a signal sets at once
    late = server.post(CHAT, json=GOOD)
    for refused in (server.get("/ready"), late):
        assert refusal(refused, 503)["code"] == "shutting_down"
    assert late.headers["retry-after"]
    server.server.should_exit = True
    for thread in threads:
        thread.join()
    assert answers[False].json()["usage"]["completion_tokens"] == 12
    assert answers[True].text.endswith("data: [DONE]\n\n")


def test_what_takes_too_long_at_shutdown_is_cancelled_and_told(start):
    server = start(limits=Limits(shutdown_seconds=0.2))
    with server.http.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        next(parts)
        server.server.should_exit = True
        rest = "".join(parts)
    assert "shutting_down" in rest and "[DONE]" not in rest
    assert server.engine.cancelled == 1


def test_a_second_signal_cancels_what_is_in_hand(start):
    server = start(limits=Limits(shutdown_seconds=600))
    with server.http.stream("POST", CHAT, json=SLOW | {"stream": True}) as response:
        parts = response.iter_text()
        text = next(parts)
        server.server.handle_exit(signal.SIGTERM, None)
        text += next(parts)  # the first signal leaves it to end
        server.server.handle_exit(signal.SIGTERM, None)
        rest = "".join(parts)
    assert "shutting_down" not in text and "shutting_down" in rest
    assert not server.server.interrupted and not server.server.force_exit
