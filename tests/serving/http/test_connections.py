"""Tests with raw sockets: clients that disconnect, send or read slowly, or are too numerous."""

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
from tests.serving.http.api_requests import CHAT, chat_body
from tests.serving.http.concurrency import run_in_threads, wait_until

SECONDS = 10.0


def chat(text: str, **fields: object) -> bytes:
    """Return the bytes of a chat request."""
    body = json.dumps(chat_body(text, **fields)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def open_client(server, content: bytes = b"") -> socket.socket:
    """Connect a client with a small receive buffer and send these bytes."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(SECONDS)
    client.connect(server.address)
    with contextlib.suppress(OSError):
        client.sendall(content)
    return client


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    parts = []
    with client, contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def connections(server) -> set:
    return server.server.server_state.connections


def test_disconnect_during_stream_cancels_generation(shared):
    engine = shared.engine
    before = engine.cancelled
    completed = engine.completed
    with open_client(shared, chat("be slow", stream=True)) as client:
        content = b""
        while b"BE" not in content and b'"content":"b"' not in content:
            content += client.recv(4096)
    assert wait_until(
        lambda: engine.cancelled > before and engine.completed > completed and not shared.request_queue.pending
    )


def test_disconnect_before_response_cancels_all_choices(shared):
    engine = shared.engine
    count = len(shared.engine.submitted)
    before = shared.engine.completed
    with open_client(shared, chat("be slow", n=3)):
        assert wait_until(lambda: len(engine.submitted) == count + 3 and engine.running == 3)
    assert wait_until(lambda: engine.completed == before + 3 and not shared.request_queue.pending)
    assert 'route="/v1/chat/completions",status="499"' in shared.get("/metrics").text


def test_disconnect_during_body_is_counted_as_499(shared):
    def count_status(status: int) -> float:
        lines = shared.get("/metrics").text.splitlines()
        label = f'deltaw_requests_total{{model="",route="/v1/chat/completions",status="{status}"}}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(label))

    before = count_status(499)
    open_client(shared, chat("hello")[:-10]).close()
    assert wait_until(lambda: count_status(499) == before + 1)
    assert not count_status(500) and not shared.request_queue.pending


def drip(client: socket.socket, line: bytes) -> None:
    """Send a byte at intervals, so that the connection is never idle."""
    with contextlib.suppress(OSError):
        for number in range(1000):
            client.sendall(line[number % len(line) :][:1])
            time.sleep(0.05)


def test_slow_headers_and_bodies_time_out(start):
    server = start(limits=Limits(body_seconds=0.3))
    empty, header, body = (open_client(server, sent) for sent in (b"", chat("hello")[:30], chat("hello")[:-10]))
    dripping = threading.Thread(target=drip, args=(header, b"X-A: b\r\n"))
    dripping.start()
    for client in (empty, header, body):
        answer = read_all(client)
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer, answer
    dripping.join()
    assert server.get("/health").status_code == 200


def test_keep_alive_connection_serves_slow_responses(start):
    """The time limit of a header is reset for each request and does not include the response."""
    server = start(limits=Limits(body_seconds=0.4))
    for _ in range(2):
        # The response takes longer than the time limit of a header.
        assert server.post(CHAT, json=chat_body("be slow", max_tokens=10)).status_code == 200


def test_client_that_does_not_read_is_disconnected(start):
    server = start(limits=Limits(write_seconds=0.3, new_tokens=1 << 20), positions=None)
    with open_client(server, chat("go on", stream=True)):
        assert wait_until(lambda: server.engine.running == 1)
        assert wait_until(lambda: server.engine.running == 0 and not server.request_queue.pending)


def test_client_with_small_unread_remainder_is_disconnected(start):
    """A small unread remainder does not pause writing, so it needs a separate time limit."""
    server = start(limits=Limits(write_seconds=0.3, keep_alive=600))
    with open_client(server) as client:
        assert wait_until(lambda: len(connections(server)) == 1)
        [connection] = connections(server)
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.sendall(chat("say " + "x" * 30, logprobs=True, top_logprobs=20))
        assert wait_until(lambda: not connections(server))


def test_shutdown_does_not_wait_for_slow_clients(start):
    """An incomplete body, an incomplete header and an unread response do not delay shutdown."""
    server = start(limits=Limits(body_seconds=600, write_seconds=600))
    header = open_client(server, chat("hello")[:30])
    body = open_client(server, chat("hello")[:-10])
    long = chat("go on", stream=True, logprobs=True, top_logprobs=20, max_tokens=4000)
    with open_client(server, long):
        assert wait_until(lambda: len(server.server.server_state.tasks) == 2 and server.engine.completed == 1)
        server.server.should_exit = True
        assert read_all(body).startswith(b"HTTP/1.1 503 ") and read_all(header) == b""
        assert wait_until(lambda: not connections(server))


def test_shutdown_does_not_wait_for_constraints(start, monkeypatch):
    server = start()
    compiled = threading.Event()

    def submit(*arguments: object) -> None:
        compiled.wait()
        raise UserError("it cannot be compiled")

    monkeypatch.setattr(server.engine, "submit", submit)
    clients = [
        open_client(server, chat("hello", guided_regex="a")) for _ in range(6)
    ]  # more than the number of preparation threads
    assert wait_until(lambda: server.request_queue.pending == 6)
    assert server.get("/health").status_code == 200
    server.server.should_exit = True
    assert all(read_all(client).startswith(b"HTTP/1.1 503 ") for client in clients)
    compiled.set()


def test_invalid_or_oversized_http_is_rejected(shared):
    header = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 200_000
    for content in (b"\x16\x03\x01\x02\x00\x01" + b"\r\n" * 3, b"nonsense" + b"\r\n" * 5, header):
        assert read_all(open_client(shared, content)).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))


def test_number_of_connections_is_limited(start):
    server = start(limits=Limits(connections=4))
    clients = [open_client(server) for _ in range(4)]
    assert wait_until(lambda: len(connections(server)) == 4)
    answer = read_all(open_client(server))
    assert answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer
    for client in clients:
        client.close()
    assert wait_until(lambda: not connections(server))
    assert server.get("/health").status_code == 200


def test_request_flood_is_answered_completely(start):
    """With more concurrent requests than the limit, each one is answered or rejected with 429."""
    server = start("poet", limits=Limits(queue=8))

    def send_chat(number: int) -> tuple[int, str]:
        response = server.post(CHAT, json=chat_body(f"q{number}", model="poet"))
        body = response.json()
        return response.status_code, "" if "error" in body else body["choices"][0]["message"]["content"]

    for wave in range(10):
        numbers = range(16 * wave, 16 * wave + 16)
        for number, (status, text) in zip(numbers, run_in_threads(send_chat, numbers), strict=True):
            assert (status, text) in ((429, ""), (200, f"poet: Q{number}"))
    assert wait_until(lambda: not server.request_queue.pending) and server.engine.running == 0


def test_socket_disables_nagle_algorithm():
    """Nagle's algorithm would delay a streamed token until the client acknowledges the previous one."""
    bound = listening_socket(ServerSettings(port=0))
    flags: list[int] = []

    async def exchange() -> None:
        def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            flags.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=bound):
            reader, writer = await asyncio.open_connection(*bound.getsockname()[:2])
            await reader.read()
            writer.close()

    asyncio.run(exchange())
    assert flags and all(flags)
