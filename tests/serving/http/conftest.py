"""Fixtures that start servers. Tests are skipped if a required package is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def packages() -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
        pytest.importorskip(name, reason=f"the server's tests need {name}: it is in the extra 'dev'")


@contextlib.contextmanager
def server_starter() -> Iterator[Callable[..., Any]]:
    """Yield a function that starts a server with adapters and settings. All servers are stopped on exit."""
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.fake_engine import POSITIONS, fake_served
    from tests.serving.http.server_thread import run_server

    with contextlib.ExitStack() as stack:

        def start(*names: str, positions: int | None = POSITIONS, **settings: Any) -> Any:
            served = fake_served(*names, positions=positions)
            return stack.enter_context(run_server(served, ServerSettings(port=0, **settings)))

        yield start


@pytest.fixture
def start(packages: None) -> Iterator[Callable[..., Any]]:
    with server_starter() as start:
        yield start


@pytest.fixture(scope="module")
def shared(packages: None) -> Iterator[Any]:
    """Server with adapters for tests that do not change it."""
    with server_starter() as start:
        yield start("poet", "clerk", "tools")
