"""Studio without processes: a client with the cookie, and a queue and a worker that record their calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi.testclient import TestClient

from deltaw.serving.http.settings import ServerSettings
from deltaw.studio.app import create_app
from deltaw.studio.guard import Token
from deltaw.studio.state import Studio
from deltaw.studio.workspace import Workspace

ADDRESS = "http://127.0.0.1:7860"


class RecordingQueue:
    """Queue that records jobs instead of running them."""

    def __init__(self) -> None:
        self.added: list[dict[str, Any]] = []
        self.on_start: list[Any] = []
        self.problem: Any = None

    def add(self, verb: str, arguments: list[str], **options: Any) -> SimpleNamespace:
        self.added.append({"verb": verb, "arguments": arguments, **options})
        return SimpleNamespace(identity="0123456789ab")

    def jobs(self) -> list[Any]:
        return []

    def active(self) -> list[Any]:
        return []

    def busy(self) -> None:
        return None


class StudioClient(TestClient):
    """Client of a studio. It sends the Origin header of the studio's own pages, and does not follow redirects."""

    studio: Studio
    queue: RecordingQueue
    token: Token
    announced: list[str]


def connect(folder: Path, *, log_in: bool = True, max_upload: int = 10_000, **settings: Any) -> StudioClient:
    """Return a client of a studio in a folder."""
    queue = RecordingQueue()
    worker = SimpleNamespace()
    announced = []
    token = Token(announced.append)
    studio = Studio(Workspace(folder, max_upload), worker, queue, SimpleNamespace(run=None))  # type: ignore[arg-type]
    app = create_app(studio, ServerSettings(port=7860, **settings), token)
    client = StudioClient(app, base_url=ADDRESS, follow_redirects=False, headers={"Origin": ADDRESS})
    client.studio = studio
    client.queue = queue
    client.token = token
    client.announced = announced
    if log_in:
        assert client.get("/", params={"token": token.value}).status_code == 200
    return client
