"""Servers for the tests, which are skipped where a package that the server needs is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.running import Running


@pytest.fixture(scope="session")
def packages() -> None:
    for name in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
        pytest.importorskip(name, reason=f"the server's tests need {name}: it is in the extra 'dev'")


@pytest.fixture(scope="module")
def shared(packages: None) -> Iterator[Running]:
    """One server with adapters, for tests that leave it as it is."""
    from deltaw.serving.http.settings import ServerSettings
    from tests.serving.http.fake_engine import fake_served
    from tests.serving.http.running import running

    with running(fake_served("poet", "clerk", "tools"), ServerSettings(port=0)) as server:
        yield server


@pytest.fixture
def start(packages: None) -> Iterator[Callable[..., Running]]:
    """Starts servers of the test's own settings, and ends them after it."""
    from tests.serving.http.fake_engine import fake_served
    from tests.serving.http.running import running

    with contextlib.ExitStack() as stack:

        def started(settings: ServerSettings, *names: str, **changes: object) -> Running:
            return stack.enter_context(running(fake_served(*names, **changes), settings))

        yield started
