"""A real server in a thread, on a free port, with an engine that needs no model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from deltaw.serving.http.app import create_app
from deltaw.serving.http.queue import RequestQueue
from deltaw.serving.http.served import Served
from deltaw.serving.http.server import Server, listening_socket, server_url
from deltaw.serving.http.settings import ServerSettings
from tests.serving.http.api_requests import CHAT, GOOD
from tests.serving.http.concurrency import wait_until
from tests.serving.http.fake_engine import FakeEngine


@dataclass
class RunningServer:
    """A running server.

    Attributes:
        url: Base URL of the server.
        http: Client of the server, with its methods ``get`` and ``post``.
    """

    url: str
    served: Served
    request_queue: RequestQueue
    server: Server

    def __post_init__(self) -> None:
        self.http = self.client()
        self.get = self.http.get
        self.post = self.http.post

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.served.engine, FakeEngine)
        return self.served.engine

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self) -> httpx.Client:
        """Return a client with its own connections. It does not load certificates, which is slow."""
        return httpx.Client(base_url=self.url, timeout=20, verify=False)

    def is_responsive(self) -> bool:
        """Return True if the server still works and has no pending requests."""
        # The server releases a request after the last byte of its response, so the client may be earlier.
        return self.post(CHAT, json=GOOD).status_code == 200 and wait_until(lambda: not self.request_queue.pending)


@contextlib.contextmanager
def run_server(served: Served, settings: ServerSettings) -> Iterator[RunningServer]:
    """Run a server in a thread while the block is open."""
    app, request_queue = create_app(served, settings)
    bound = listening_socket(settings)
    started = threading.Event()
    server = Server(app, request_queue, settings, started.set)
    thread = threading.Thread(target=server.run, args=([bound],))
    url = server_url(settings, bound)
    thread.start()
    try:
        assert started.wait(20)
        instance = RunningServer(url, served, request_queue, server)  # type: ignore[arg-type]
        with instance.http:
            yield instance
    finally:
        server.should_exit = True
        thread.join(20)
        if served.engine is not None and request_queue is not None:
            served.engine.close()
            request_queue.close()
    assert not thread.is_alive()
