"""Servers for the tests, which are skipped where a package that the server needs is missing."""

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
def starting() -> Iterator[Callable[..., Any]]:
    """Starts servers with these adapters and settings, and ends them at the end."""
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.fake_engine import POSITIONS, fake_served
    from tests.serving.http.running import running

    with contextlib.ExitStack() as stack:

        def start(*names: str, positions: int | None = POSITIONS, **settings: Any) -> Any:
            served = fake_served(*names, positions=positions)
            return stack.enter_context(running(served, ServerSettings(port=0, **settings)))

        yield start


@pytest.fixture
def start(packages: None) -> Iterator[Callable[..., Any]]:
    with starting() as start:
        yield start


@pytest.fixture(scope="module")
def shared(packages: None) -> Iterator[Any]:
    """One server with adapters, for tests that leave it as it is."""
    with starting() as start:
        yield start("poet", "clerk", "tools")
