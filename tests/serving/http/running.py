"""A real server in a thread, on a free port, over an engine that needs no model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from deltaw.serving.http.app import create_app
from deltaw.serving.http.preparing import Desk
from deltaw.serving.http.served import Served
from deltaw.serving.http.server import Server, listening_socket, url_of
from deltaw.serving.http.settings import ServerSettings
from tests.serving.http.asking import CHAT, GOOD
from tests.serving.http.fake_engine import FakeEngine
from tests.serving.http.waiting import until


@dataclass
class Running:
    """A server that is running.

    Attributes:
        http: a client of it. get, post: ask by it.
    """

    url: str
    served: Served
    desk: Desk
    server: Server

    def __post_init__(self) -> None:
        self.http = self.client()
        self.get, self.post = self.http.get, self.http.post

    @property
    def engine(self) -> FakeEngine:
        assert isinstance(self.served.engine, FakeEngine)
        return self.served.engine

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def client(self) -> httpx.Client:
        """A client with connections of its own; it reads no certificates, which takes longer than a request."""
        return httpx.Client(base_url=self.url, timeout=20, verify=False)

    def answers(self) -> bool:
        """Whether the server still does its work, and holds nothing that it should have let go."""
        # It lets go of a text after the answer's last byte, which the client may be the first to see.
        return self.post(CHAT, json=GOOD).status_code == 200 and until(lambda: not self.desk.in_hand)


@contextlib.contextmanager
def running(served: Served, settings: ServerSettings) -> Iterator[Running]:
    """A server while the block is open."""
    app, desk = create_app(served, settings)
    bound = listening_socket(settings)
    began = threading.Event()
    server = Server(app, desk, settings, began.set)
    thread = threading.Thread(target=server.run, args=([bound],))
    url = url_of(settings, bound)
    thread.start()
    try:
        assert began.wait(20)
        made = Running(url, served, desk, server)  # type: ignore[arg-type]
        with made.http:
            yield made
    finally:
        server.should_exit = True
        thread.join(20)
        if served.engine is not None and desk is not None:
            served.engine.close()
            desk.close()
    assert not thread.is_alive()
