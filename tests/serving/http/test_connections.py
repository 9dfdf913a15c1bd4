"""Clients on raw sockets: those that go away, that are slow to ask or to read, or too many."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from deltaw.errors import UserError
from deltaw.serving.http.settings import Limits, ServerSettings
from tests.serving.http.waiting import at_once, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.serving.http.running import Running

SECONDS = 10.0


def chat(text: str, **changes: object) -> bytes:
    """A request for a chat, as bytes."""
    asked = {"model": "base", "messages": [{"role": "user", "content": text}], "temperature": 0} | changes
    body = json.dumps(asked).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connected(server: Running) -> socket.socket:
    """A client that reads little before it is asked to."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(SECONDS)
    client.connect(server.address)
    return client


def received(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_client_that_leaves_a_stream_ends_its_text(shared: Running) -> None:
    engine = shared.engine
    before, ended = engine.cancelled, engine.ended
    client = connected(shared)
    client.sendall(chat("be slow", stream=True))
    got = b""
    while b"BE" not in got and b'"content":"b"' not in got:
        got += client.recv(4096)
    client.close()
    assert until(lambda: engine.cancelled > before and engine.ended > ended and not shared.desk.in_hand)


def test_a_client_that_leaves_before_its_answer_ends_its_texts(shared: Running) -> None:
    engine = shared.engine
    count = len(engine.submitted)
    before = engine.ended
    client = connected(shared)
    client.sendall(chat("be slow", n=3))
    assert until(lambda: len(engine.submitted) == count + 3 and engine.running == 3)
    client.close()
    assert until(lambda: engine.ended == before + 3 and not shared.desk.in_hand)
    with shared.client() as other:
        metrics = other.get("/metrics").text
    assert 'route="/v1/chat/completions",status="499"' in metrics


def test_a_client_that_leaves_in_its_body_costs_nothing(shared: Running) -> None:
    def refused(status: int) -> float:
        with shared.client() as other:
            lines = other.get("/metrics").text.splitlines()
        label = f'deltaw_requests_total{{model="",route="/v1/chat/completions",status="{status}"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(label))

    before = refused(499)
    client = connected(shared)
    client.sendall(chat("hello")[:-10])
    client.close()
    assert until(lambda: refused(499) == before + 1)
    assert not refused(500) and not shared.desk.in_hand


def test_slow_headers_and_bodies_are_not_waited_for(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(body_seconds=0.3)))
    whole = chat("hello")
    nothing, header, body = (connected(server) for _ in range(3))
    header.sendall(whole[:30])
    body.sendall(whole[:-10])
    dripping = threading.Thread(target=_drip, args=(header, b"X-A: b\r\n"))
    dripping.start()
    for client in (nothing, header, body):
        answer = received(client)
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer, answer
        client.close()
    dripping.join()
    with server.client() as client:
        assert client.get("/health").status_code == 200


def _drip(client: socket.socket, line: bytes) -> None:
    """A byte now and then, so that the connection is never idle."""
    with contextlib.suppress(OSError):
        for number in range(1000):
            client.sendall(line[number % len(line) :][:1])
            time.sleep(0.05)


def test_a_kept_connection_serves_again_within_its_time(start: Callable[..., Running]) -> None:
    """The time for a header begins anew with each request, and ends with it."""
    server = start(ServerSettings(port=0, limits=Limits(body_seconds=1.0)))
    with server.client() as client:
        for _ in range(2):
            slow = client.post(
                "/v1/chat/completions",
                json={"model": "base", "messages": [{"role": "user", "content": "be slow"}], "max_tokens": 25},
            )
            assert slow.status_code == 200  # longer than the header's time


def test_a_client_that_does_not_read_is_let_go(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(write_seconds=0.3, new_tokens=1 << 20)), positions=None)
    client = connected(server)
    client.sendall(chat("go on", stream=True))
    assert until(lambda: server.engine.running == 1)
    assert until(lambda: server.engine.running == 0 and not server.desk.in_hand)
    client.close()


def test_what_little_is_left_unread_is_let_go_too(start: Callable[..., Running]) -> None:
    """What is too little for writing to pause would keep its connection for ever."""
    server = start(ServerSettings(port=0, limits=Limits(write_seconds=0.3, keep_alive=600)))
    client = connected(server)
    assert until(lambda: len(server.server.server_state.connections) == 1)
    [connection] = server.server.server_state.connections
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client.sendall(chat("say " + "x" * 30, logprobs=True, top_logprobs=20))
    assert until(lambda: not server.server.server_state.connections)
    client.close()


def test_at_shutdown_nobody_waits_for_slow_clients(start: Callable[..., Running]) -> None:
    """A body that does not arrive, a header that does not, and an answer that is not read."""
    server = start(ServerSettings(port=0, limits=Limits(body_seconds=600, write_seconds=600)))
    header, body, unread = (connected(server) for _ in range(3))
    header.sendall(chat("hello")[:30])
    body.sendall(chat("hello")[:-10])
    unread.sendall(chat("go on", stream=True, logprobs=True, top_logprobs=20, max_tokens=4000))
    assert until(lambda: len(server.server.server_state.tasks) == 2 and server.engine.ended == 1)
    server.server.should_exit = True
    assert received(body).startswith(b"HTTP/1.1 503 ")
    assert received(header) == b""
    assert until(lambda: not server.server.server_state.connections)
    for client in (header, body, unread):
        client.close()


def test_at_shutdown_nobody_waits_for_constraints(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(ServerSettings(port=0))
    compiled = threading.Event()

    def submit(*given: object) -> None:
        compiled.wait()
        raise UserError("it cannot be compiled")

    monkeypatch.setattr(server.engine, "submit", submit)
    answers: list[bytes] = []

    def ask() -> None:
        with connected(server) as client:
            client.sendall(chat("hello", guided_regex="a"))
            answers.append(received(client))

    threads = [threading.Thread(target=ask) for _ in range(6)]  # more than prepare requests
    for thread in threads:
        thread.start()
    assert until(lambda: server.desk.in_hand == 6)
    with server.client() as other:
        assert other.get("/health").status_code == 200
    server.server.should_exit = True
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    compiled.set()
    assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)


def test_what_is_no_http_is_refused(shared: Running) -> None:
    for line in (b"\x16\x03\x01\x02\x00\x01", b"nonsense\r\n\r\n"):
        client = connected(shared)
        client.sendall(line + b"\r\n" * 3)
        assert received(client).startswith(b"HTTP/1.1 400 ")
        client.close()


def test_headers_have_a_bound(shared: Running) -> None:
    client = connected(shared)
    with contextlib.suppress(OSError):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 200_000)
    assert received(client).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    client.close()


def test_connections_have_a_bound(start: Callable[..., Running]) -> None:
    server = start(ServerSettings(port=0, limits=Limits(connections=4)))
    clients = [connected(server) for _ in range(4)]
    assert until(lambda: len(server.server.server_state.connections) == 4)
    refused = connected(server)
    answer = received(refused)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer
    for client in (*clients, refused):
        client.close()
    assert until(lambda: not server.server.server_state.connections)
    with server.client() as client:
        assert client.get("/health").status_code == 200


def test_a_flood_is_answered_to_the_last(start: Callable[..., Running]) -> None:
    """More requests at once than may be in hand: each is answered, or told to come again."""
    server = start(ServerSettings(port=0, limits=Limits(queue=8)), "poet")
    seen: list[tuple[int, str]] = []

    def ask(number: int) -> None:
        with server.client() as client:
            for turn in range(10):
                text = f"q{number}x{turn}"
                asked = {"model": "poet", "messages": [{"role": "user", "content": text}], "temperature": 0}
                response = client.post("/v1/chat/completions", json=asked)
                right = True
                if response.status_code == 200:
                    content = response.json()["choices"][0]["message"]["content"]
                    right = content == f"poet: {text.upper()}"
                seen.append((response.status_code, "" if right else text))

    at_once(ask, range(16))
    assert len(seen) == 160 and {status for status, _ in seen} <= {200, 429}
    assert not [wrong for _, wrong in seen if wrong]
    assert until(lambda: not server.desk.in_hand) and server.engine.running == 0
