"""Clients on raw sockets: those that go away, that are slow to ask or to read, or too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

from deltaw.errors import UserError
from deltaw.serving.http.server import listening_socket
from deltaw.serving.http.settings import Limits, ServerSettings
from tests.serving.http.asking import CHAT, said
from tests.serving.http.waiting import at_once, until

SECONDS = 10.0


def chat(text: str, **changes: object) -> bytes:
    """A request for a chat, as bytes."""
    body = json.dumps(said(text, **changes)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connected(server, sent: bytes = b"") -> socket.socket:
    """A client that has sent this, and reads little before it is asked to."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(SECONDS)
    client.connect(server.address)
    with contextlib.suppress(OSError):
        client.sendall(sent)
    return client


def received(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    with client, contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def connections(server) -> set:
    return server.server.server_state.connections


def test_a_client_that_leaves_a_stream_ends_its_text(shared):
    engine = shared.engine
    before, ended = engine.cancelled, engine.ended
    with connected(shared, chat("be slow", stream=True)) as client:
        got = b""
        while b"BE" not in got and b'"content":"b"' not in got:
            got += client.recv(4096)
    assert until(lambda: engine.cancelled > before and engine.ended > ended and not shared.desk.in_hand)


def test_a_client_that_leaves_before_its_answer_ends_its_texts(shared):
    engine, count, before = shared.engine, len(shared.engine.submitted), shared.engine.ended
    with connected(shared, chat("be slow", n=3)):
        assert until(lambda: len(engine.submitted) == count + 3 and engine.running == 3)
    assert until(lambda: engine.ended == before + 3 and not shared.desk.in_hand)
    assert 'route="/v1/chat/completions",status="499"' in shared.get("/metrics").text


def test_a_client_that_leaves_in_its_body_costs_nothing(shared):
    def refused(status: int) -> float:
        lines = shared.get("/metrics").text.splitlines()
        label = f'deltaw_requests_total{{model="",route="/v1/chat/completions",status="{status}"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(label))

    before = refused(499)
    connected(shared, chat("hello")[:-10]).close()
    assert until(lambda: refused(499) == before + 1)
    assert not refused(500) and not shared.desk.in_hand


def drip(client: socket.socket, line: bytes) -> None:
    """A byte now and then, so that the connection is never idle."""
    with contextlib.suppress(OSError):
        for number in range(1000):
            client.sendall(line[number % len(line) :][:1])
            time.sleep(0.05)


def test_slow_headers_and_bodies_are_not_waited_for(start):
    server = start(limits=Limits(body_seconds=0.3))
    nothing, header, body = (connected(server, sent) for sent in (b"", chat("hello")[:30], chat("hello")[:-10]))
    dripping = threading.Thread(target=drip, args=(header, b"X-A: b\r\n"))
    dripping.start()
    for client in (nothing, header, body):
        answer = received(client)
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer, answer
    dripping.join()
    assert server.get("/health").status_code == 200


def test_a_kept_connection_serves_again_within_its_time(start):
    """The time for a header begins anew with each request, and ends with it."""
    server = start(limits=Limits(body_seconds=0.4))
    for _ in range(2):
        # Longer than the header's time.
        assert server.post(CHAT, json=said("be slow", max_tokens=10)).status_code == 200


def test_a_client_that_does_not_read_is_let_go(start):
    server = start(limits=Limits(write_seconds=0.3, new_tokens=1 << 20), positions=None)
    with connected(server, chat("go on", stream=True)):
        assert until(lambda: server.engine.running == 1)
        assert until(lambda: server.engine.running == 0 and not server.desk.in_hand)


def test_what_little_is_left_unread_is_let_go_too(start):
    """What is too little for writing to pause would keep its connection for ever."""
    server = start(limits=Limits(write_seconds=0.3, keep_alive=600))
    with connected(server) as client:
        assert until(lambda: len(connections(server)) == 1)
        [connection] = connections(server)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sendall(chat("say " + "x" * 30, logprobs=True, top_logprobs=20))
        assert until(lambda: not connections(server))


def test_at_shutdown_nobody_waits_for_slow_clients(start):
    """A body that does not arrive, a header that does not, and an answer that is not read."""
    server = start(limits=Limits(body_seconds=600, write_seconds=600))
    header, body = connected(server, chat("hello")[:30]), connected(server, chat("hello")[:-10])
    long = chat("go on", stream=True, logprobs=True, top_logprobs=20, max_tokens=4000)
    with connected(server, long):
        assert until(lambda: len(server.server.server_state.tasks) == 2 and server.engine.ended == 1)
        server.server.should_exit = True
        assert received(body).startswith(b"HTTP/1.1 503 ") and received(header) == b""
        assert until(lambda: not connections(server))


def test_at_shutdown_nobody_waits_for_constraints(start, monkeypatch):
    server = start()
    compiled = threading.Event()

    def submit(*given: object) -> None:
        compiled.wait()
        raise UserError("it cannot be compiled")

    monkeypatch.setattr(server.engine, "submit", submit)
    clients = [connected(server, chat("hello", guided_regex="a")) for _ in range(6)]  # more than prepare requests
    assert until(lambda: server.desk.in_hand == 6)
    assert server.get("/health").status_code == 200
    server.server.should_exit = True
    assert all(received(client).startswith(b"HTTP/1.1 503 ") for client in clients)
    compiled.set()


def test_what_is_no_http_or_too_much_is_refused(shared):
    header = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 200_000
    for sent in (b"\x16\x03\x01\x02\x00\x01" + b"\r\n" * 3, b"nonsense" + b"\r\n" * 5, header):
        assert received(connected(shared, sent)).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))


def test_connections_have_a_bound(start):
    server = start(limits=Limits(connections=4))
    clients = [connected(server) for _ in range(4)]
    assert until(lambda: len(connections(server)) == 4)
    answer = received(connected(server))
    assert answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer
    for client in clients:
        client.close()
    assert until(lambda: not connections(server))
    assert server.get("/health").status_code == 200


def test_a_flood_is_answered_to_the_last(start):
    """More requests at once than may be in hand: each is answered, or told to come again."""
    server = start("poet", limits=Limits(queue=8))

    def ask(number: int) -> tuple[int, str]:
        response = server.post(CHAT, json=said(f"q{number}", model="poet"))
        found = response.json()
        return response.status_code, "" if "error" in found else found["choices"][0]["message"]["content"]

    for turn in range(10):
        numbers = range(16 * turn, 16 * turn + 16)
        for number, (status, text) in zip(numbers, at_once(ask, numbers), strict=True):
            assert (status, text) in ((429, ""), (200, f"poet: Q{number}"))
    assert until(lambda: not server.desk.in_hand) and server.engine.running == 0


def test_the_socket_sends_pieces_at_once():
    """Nagle's algorithm would hold a streamed token back until the client acknowledges the one before."""
    bound = listening_socket(ServerSettings(port=0))
    found: list[int] = []

    async def ask() -> None:
        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=bound):
            reader, writer = await asyncio.open_connection(*bound.getsockname()[:2])
            await reader.read()
            writer.close()

    asyncio.run(ask())
    assert found and all(found)
